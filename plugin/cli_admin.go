package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// pluginSockets is where Docker lets managed plugins put their sockets, each in a
// folder named after the plugin's id.
const pluginSockets = "/run/docker/plugins"

// adminClient asks the plugin's admin socket.
type adminClient struct {
	path string // "" until find
}

// errNotRunning says that no plugin answers.
var errNotRunning = errors.New("weft does not run on this host; start it with: docker plugin enable weft:latest")

// find sets the path: the flag, WEFT_SOCKET, or the only socket at which somebody
// answers.
func (a *adminClient) find() error {
	if a.path == "" {
		a.path = os.Getenv("WEFT_SOCKET")
	}
	if a.path != "" {
		return nil
	}
	found, err := findSockets(pluginSockets)
	if err != nil {
		return err
	}
	switch len(found) {
	case 0:
		return errNotRunning
	case 1:
		a.path = found[0]
		return nil
	}
	return fmt.Errorf("several plugins answer; choose one with --socket: %s", strings.Join(found, " "))
}

// findSockets returns the admin sockets below dir that answer. What a stopped
// plugin left is passed over.
func findSockets(dir string) ([]string, error) {
	if _, err := os.ReadDir(dir); errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%s cannot be read; run weft as root", dir)
	}
	paths, _ := filepath.Glob(filepath.Join(dir, "*", adminSocket)) // the pattern is valid
	paths = append(paths, filepath.Join(dir, adminSocket))
	return slices.DeleteFunc(paths, func(p string) bool {
		conn, err := net.DialTimeout("unix", p, time.Second)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	}), nil
}

// pluginID returns the id of the plugin whose socket it is, "" if the path does
// not tell.
func (a *adminClient) pluginID() string {
	id := filepath.Base(filepath.Dir(a.path))
	if len(id) != 64 {
		return ""
	}
	return id
}

// httpError is an answer other than 200.
type httpError struct {
	status int
	text   string
}

func (e *httpError) Error() string { return e.text }

// ask gets a path of the admin API.
func ask[T any](ctx context.Context, a *adminClient, path string) (T, error) {
	return request[T](ctx, a, http.MethodGet, path)
}

// tell posts to a path of the admin API.
func tell[T any](ctx context.Context, a *adminClient, path string) (T, error) {
	return request[T](ctx, a, http.MethodPost, path)
}

func request[T any](ctx context.Context, a *adminClient, method, path string) (T, error) {
	var v T
	if err := a.find(); err != nil {
		return v, err
	}
	raw, err := overUnix(ctx, a.path, method, path, adminLimit+5*time.Second)
	var bad *httpError
	switch {
	case errors.As(err, &bad):
		var e adminError
		if json.Unmarshal([]byte(bad.text), &e) == nil && e.Error != "" {
			bad.text = e.Error
		}
		return v, bad
	case errors.Is(err, fs.ErrPermission):
		return v, fmt.Errorf("socket %s: permission denied; run weft as root", a.path)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return v, fmt.Errorf("nobody answers at %s: %w", a.path, errNotRunning)
	case err != nil:
		return v, fmt.Errorf("ask the plugin at %s: %w", a.path, err)
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, fmt.Errorf("the plugin's answer cannot be read (%w); are command and plugin of one version? weft version tells", err)
	}
	return v, nil
}

// getUnix gets a path from an HTTP server on a Unix socket.
func getUnix(ctx context.Context, socket, path string, limit time.Duration) ([]byte, error) {
	return overUnix(ctx, socket, http.MethodGet, path, limit)
}

func overUnix(ctx context.Context, socket, method, path string, limit time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://weft"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	var noise *url.Error // repeats an address that we made up
	if errors.As(err, &noise) {
		err = noise.Err
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, &httpError{status: resp.StatusCode, text: strings.TrimSpace(string(raw))}
	}
	return raw, nil
}
