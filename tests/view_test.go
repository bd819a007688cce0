package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// networkView is a network as `weft networks -o json` shows it.
type networkView struct {
	ID           string
	VNI          int
	Internal     bool
	Options      map[string]string
	Subnets      []subnetView
	Bridge       string
	EffectiveMTU int
	Endpoints    int
	Remote       int
	Peers        []string
}

type subnetView struct {
	Pool    string
	Gateway string
	Aux     map[string]string
}

// endpointView is an endpoint as `weft endpoints -o json` shows it.
type endpointView struct {
	ID      string
	VNI     int
	Network string
	Host    string
	Local   bool
	State   string
	MAC     string
	IPv4    netip.Addr
	IPv6    netip.Addr
	Link    string
	Program *struct{ Dropped map[string]int }
}

// peerView is a peer as `weft peers -o json` shows it.
type peerView struct {
	Name      string
	Address   netip.Addr
	Alive     bool
	InSync    bool
	LastErr   string
	DeadSince time.Time
}

// statusView is the part of `weft status -o json` that is asked for.
type statusView struct {
	Ready    bool
	IPTables string
	Program  string
	Host     struct{ ID string }
	Problems []struct {
		Text, Remedy string
		Advice       bool
	}
	Underlay struct{ Address netip.Addr }
	Loop     struct{ Repaired map[string]int }
}

// view returns what a weft command shows, such as "networks".
func view[T any](t *testing.T, h *hosts.Host, command string) T {
	t.Helper()
	var v T
	out, err := h.Exec(t.Context(), "weft", command, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &v)
	}
	// status ends with 1 when it knows a problem, and prints all the same.
	if err != nil && (command != "status" || json.Unmarshal([]byte(out), &v) != nil) {
		t.Fatalf("host %s: weft %s: %v\n%s", h.Name, command, err, out)
	}
	return v
}

// networkOf returns the records of the network that Docker knows by name.
func networkOf(t *testing.T, h *hosts.Host, name string) networkView {
	t.Helper()
	id := docker(t, h, "network", "inspect", "--format", "{{.Id}}", name)
	for _, n := range view[[]networkView](t, h, "networks") {
		if n.ID == id {
			return n
		}
	}
	t.Fatalf("host %s: network %s (%.12s) is not in weft networks", h.Name, name, id)
	return networkView{}
}

// refused runs a Docker command that must fail with all the words.
func refused(t *testing.T, h *hosts.Host, words []string, args ...string) {
	t.Helper()
	out, err := h.Docker(t.Context(), args...)
	if err == nil {
		t.Errorf("host %s: docker %s went through: %s; want a refusal with %q", h.Name, strings.Join(args, " "), out, words)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("host %s: the refusal does not name %q: %v", h.Name, w, err)
		}
	}
}

// inside runs f in the network namespace of a container.
func inside(t *testing.T, c hosts.Container, f func() error) error {
	t.Helper()
	return hosts.InNetNS(netnsOf(t, c), f)
}

// command runs a command in a container, which must succeed.
func command(t *testing.T, c hosts.Container, args ...string) string {
	t.Helper()
	out, err := c.Exec(t.Context(), args...)
	if err != nil {
		t.Fatalf("container %s: %v", c.Name, err)
	}
	return out
}

// silent fails the test if the address answers the container's ping; more are
// flags of ping.
func silent(t *testing.T, c hosts.Container, address string, more ...string) {
	t.Helper()
	if out, err := c.Exec(t.Context(), append(append([]string{"ping", "-c", "2", "-W", "1", "-i", "0.2"}, more...), address)...); err == nil {
		t.Errorf("container %s reaches %s and must not: %s", c.Name, address, out)
	}
}

// serve makes a container answer HTTP on port 80 with a word, unless it does.
func serve(t *testing.T, c hosts.Container, word string) {
	t.Helper()
	command(t, c, "sh", "-c", "echo "+word+" >/srv/index.html; pidof httpd || httpd -p 80 -h /srv")
}

// fetches waits until the URL answers the word in the network namespace at path.
func fetches(t *testing.T, netns, url, word string) {
	t.Helper()
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
			err = hosts.InNetNS(netns, func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
				return err
			})
			return conn, err
		}}}
	eventually(t, 15*time.Second, url+" answers "+word, func(ctx context.Context) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(r)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		raw, err := io.ReadAll(resp.Body)
		if err == nil && strings.TrimSpace(string(raw)) != word {
			err = fmt.Errorf("status %d: %s", resp.StatusCode, raw)
		}
		return err
	})
}

// unixClient sends requests to a Unix socket.
func unixClient(socket string) *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
}

// netnsOf is the path of a container's network namespace.
func netnsOf(t *testing.T, c hosts.Container) string {
	t.Helper()
	pid, err := c.PID(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("/proc/%d/ns/net", pid)
}

// until waits until the endpoints that the host knows satisfy ok.
func until(t *testing.T, h *hosts.Host, what string, ok func([]endpointView) bool) {
	t.Helper()
	eventually(t, 20*time.Second, "host "+h.Name+" "+what, func(context.Context) error {
		all := view[[]endpointView](t, h, "endpoints")
		if !ok(all) {
			return fmt.Errorf("it has %+v", all)
		}
		return nil
	})
}

// listenIn answers connections to a port in a namespace, until the test ends.
func listenIn(t *testing.T, netns string, port int, answer func(net.Conn)) {
	t.Helper()
	var l net.Listener
	if err := hosts.InNetNS(netns, func() (err error) {
		// What neither side says by itself is not said by the kernels either.
		silent := net.ListenConfig{KeepAlive: -1}
		l, err = silent.Listen(t.Context(), "tcp4", fmt.Sprintf(":%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				answer(c)
				_ = c.Close()
			}()
		}
	}()
}
