package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestReboot resets a virtual machine, with the kernel's WireGuard and Weft's state on its
// disk, and then kills its plugin, while its container and one of a Docker host send to each
// other on an encrypted network. A capture of its cable lasts from before its first start to
// the end.
func TestReboot(t *testing.T) {
	t.Parallel()
	hosts.Require(t, "guest")
	lab := newLab(t, 1, nil)
	a := lab.Hosts[0]
	plugin := pluginDir(t, "", "test")
	if err := a.InstallPlugin(t.Context(), plugin, clusterKey, "WEFT_JOIN="+hosts.GuestAddress.String()); err != nil {
		t.Fatal(err)
	}
	createNetwork(t, lab, "enc", 90, "-o", "encrypted", "-o", "vni=5000", "--gateway", "10.90.0.1")
	peer := run(t, a, "peer", "--network", "enc", "--ip", "10.90.1.10")
	guest, capture := startGuest(t, lab, plugin)
	sent := flood(t, []hosts.Container{peer}, []netip.Addr{netip.MustParseAddr(guestContainer)})

	resets := 1
	if soak() {
		resets = 10
	}
	start := time.Now()
	for boot := 1; boot <= resets+1; boot++ {
		if boot > 1 {
			if err := guest.Reset(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		prints(t, guest, fmt.Sprintf("GUEST start %d sent 500", boot))
		reach(t, peer, guestContainer)
	}
	took := time.Since(start)
	killedInGuest(t, guest, peer)
	time.Sleep(1200 * time.Millisecond) // tcpdump is told of packets after a second at most
	lines, raw := stopped(t, capture)
	plain, controls, wireguard := bytes.Count(raw, []byte(marker)), bytes.Count(raw, []byte(control)), 0
	for _, l := range lines {
		switch {
		case strings.Contains(l, ".4798: "):
			wireguard++
		case strings.Contains(l, " 10.90."):
			plain++
			t.Errorf("on the cable: %s", l)
		}
	}
	if plain > 0 || wireguard == 0 || controls < resets+1 {
		t.Errorf("on the cable are %d plain packets, %d of WireGuard, and %d of the %d plain ones that were sent on purpose, or refused", plain, wireguard, controls, resets+1)
	}
	figure(t, "encrypted: host reset in a guest with the kernel's WireGuard", resets, "%d plain packets (target 0) beside %d of WireGuard to the guest, %d with the marker sent to it, in %s", plain, wireguard, sent(), took.Round(time.Second))
}

// Of the guest: the address of its container, and where its disk is.
const (
	guestContainer = "10.90.2.10"
	guestState     = "/state"
	guestSockets   = "/run/weft"
	guestVariable  = "WEFT_IN_GUEST" // address of the Docker host
)

// startGuest starts the guest with the plugin and this program in it.
func startGuest(t *testing.T, lab *hosts.Lab, plugin string) (*hosts.Guest, *hosts.Capture) {
	t.Helper()
	dir, err := hosts.GuestDir()
	if err != nil {
		t.Fatal(err)
	}
	work := guestWork(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]string{"weft": filepath.Join(plugin, "rootfs/bin/weft"), "tests": self} {
		if err := os.Symlink(from, filepath.Join(work, name)); err != nil {
			t.Fatal(err)
		}
	}
	script := fmt.Sprintf(`set -e
hostname guest
mkdir -p %[1]s %[2]s
mount -t ext4 /dev/vda %[1]s
sysctl -qw net.ipv4.ip_forward=1
ip addr add %[6]s/24 dev eth0
ip link set eth0 up
ip route add default via 192.0.2.1
%[3]s %[5]s=%[4]s /tests 2>&1
`, guestState, guestSockets, clusterKey, lab.Hosts[0].Address, guestVariable, hosts.GuestAddress)
	if err := os.WriteFile(filepath.Join(work, "run.sh"), []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	image, disk := filepath.Join(work, "initramfs"), filepath.Join(work, "disk")
	if err := addToImage(t.Context(), work, image, "weft", "tests", "run.sh"); err != nil {
		t.Fatal(err)
	}
	if err := hosts.MakeDisk(t.Context(), disk, 64); err != nil {
		t.Fatal(err)
	}
	guest, err := lab.NewGuest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	capture, err := guest.Capture(t.Context(), "udp or icmp or icmp6 or tcp")
	if err != nil {
		t.Fatal(err)
	}
	if err := guest.Start(t.Context(), filepath.Join(dir, "vmlinuz"), image, disk); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(guest.Stop)
	return guest, capture
}

// prints waits until the guest has printed the words.
func prints(t *testing.T, g *hosts.Guest, words string) {
	t.Helper()
	for deadline := time.Now().Add(guestLimit); !strings.Contains(g.Console(), words); pause(t, 200*time.Millisecond) {
		if text := g.Console(); strings.Contains(text, "GUEST ends") || time.Now().After(deadline) {
			t.Fatalf("the guest does not print %q; it printed:\n%s", words, text)
		}
	}
}

// insideGuest is what this program does in the guest: it starts the plugin, asks it for
// what Docker asks it for after a start of the machine, and lets a container send and answer.
func insideGuest(docker string) error {
	boots := filepath.Join(guestState, "boots")
	raw, err := os.ReadFile(boots)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	boot, _ := strconv.Atoi(string(raw)) // 0 at first
	boot++
	if err := os.WriteFile(boots, []byte(strconv.Itoa(boot)), 0o600); err != nil {
		return err
	}
	syscall.Sync() // the next reset comes without warning
	plugin := &supervised{docker: docker}
	if err := plugin.start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for _, err := call(ctx, "Plugin.Activate", object{}); err != nil; _, err = call(ctx, "Plugin.Activate", object{}) {
		if ctx.Err() != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	network, endpoint := strings.Repeat("9", 64), fmt.Sprintf("%064x", boot)
	if boot == 1 {
		_, err = call(ctx, "NetworkDriver.CreateNetwork", object{"NetworkID": network, "IPv6Data": []object{},
			"IPv4Data": []object{{"AddressSpace": "x", "Pool": "10.90.0.0/16", "Gateway": "10.90.0.1/16"}},
			"Options":  object{"com.docker.network.generic": object{"encrypted": "", "vni": "5000"}}})
	} else { // Docker removes what the former sandboxes had, and makes the containers' endpoints anew
		_, err = call(ctx, "NetworkDriver.DeleteEndpoint", object{"NetworkID": network, "EndpointID": fmt.Sprintf("%064x", boot-1)})
	}
	if err != nil {
		return err
	}
	if _, err := call(ctx, "NetworkDriver.CreateEndpoint", object{"NetworkID": network, "EndpointID": endpoint, "Options": object{},
		"Interface": object{"Address": guestContainer + "/16", "MacAddress": "02:42:0a:5a:02:0a"}}); err != nil {
		return err
	}
	joined, err := call(ctx, "NetworkDriver.Join", object{"NetworkID": network, "EndpointID": endpoint, "SandboxKey": "/run/netns/c", "Options": object{}})
	if err != nil {
		return err
	}
	if err := becomeContainer(joined); err != nil {
		return err
	}
	plain, err := net.Dial("udp", docker+":9")
	if err != nil {
		return err
	}
	if _, err := plain.Write([]byte(control)); err != nil {
		return err
	}
	failed := make(chan error, 3)
	go func() { failed <- sendForEver(boot) }()
	go func() {
		failed <- plugin.answer(func(kills uint32) {
			if err := plugin.kill(kills); err != nil {
				failed <- err
			}
		})
	}()
	return <-failed
}

type joinAnswer struct {
	InterfaceName struct{ SrcName string }
	StaticRoutes  []struct {
		Destination string
		RouteType   int // 1: on the link
		NextHop     string
	}
	Err string
}

// call repeats what the plugin could not do in time, as a container's restart would: a
// guest without a processor of its own may get none for ten seconds.
func call(ctx context.Context, method string, body object) (a joinAnswer, err error) {
	for {
		a, err = callOnce(ctx, method, body)
		if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "it may finish later") {
			return a, err
		}
	}
}

func callOnce(ctx context.Context, method string, body object) (joinAnswer, error) {
	var a joinAnswer
	raw, err := askAt(ctx, filepath.Join(guestSockets, "weft.sock"), http.MethodPost, "/"+method, body)
	if err == nil {
		err = json.Unmarshal(raw, &a)
	}
	if err == nil && a.Err != "" {
		err = errors.New(a.Err)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", method, err)
	}
	return a, err
}

// becomeContainer moves the link into a namespace, as Docker does.
func becomeContainer(a joinAnswer) error {
	lines := []string{"netns add c", "link set " + a.InterfaceName.SrcName + " netns c name eth0",
		"-n c addr add " + guestContainer + "/16 dev eth0", "-n c link set lo up", "-n c link set eth0 up"}
	for _, r := range a.StaticRoutes {
		if r.RouteType == 1 {
			lines = append(lines, "-n c route add "+r.Destination+" dev eth0")
		} else {
			lines = append(lines, "-n c route add "+r.Destination+" via "+r.NextHop)
		}
	}
	for _, line := range lines {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, out)
		}
	}
	return nil
}

// sendForEver sends the marker to the Docker host's container and to one that does not
// exist.
func sendForEver(boot int) error {
	var c *net.UDPConn
	if err := hosts.InNetNS("/run/netns/c", func() (err error) {
		c, err = net.ListenUDP("udp", nil)
		return err
	}); err != nil {
		return err
	}
	for sent := 1; ; sent++ {
		for _, to := range []string{"10.90.1.10:7777", "10.90.3.3:7777"} {
			// What is refused is not on the cable either.
			_, _ = c.WriteToUDPAddrPort([]byte(marker), netip.MustParseAddrPort(to))
		}
		if sent%500 == 0 {
			fmt.Printf("GUEST start %d sent %d\n", boot, sent)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
