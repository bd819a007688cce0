package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/tests/hosts"
	"github.com/weftnet/weft/tests/peer"
)

// TestEncryptedKeyOfAnother has a member of the cluster that signs a record with host b's
// WireGuard key, and runs the encrypted network: nothing of a and b changes, both tell of
// it, and it ends when the member tells a key of its own, or is revoked.
func TestEncryptedKeyOfAnother(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 3, nil)
	install(t, lab, pluginDir(t, "", "test"), clusterKey)
	a, b, c := lab.Hosts[0], lab.Hosts[1], lab.Hosts[2]
	createNetwork(t, lab, "enc", 90, "-o", "encrypted", "--gateway", "10.90.0.1")
	from, to := run(t, a, "one", "--network", "enc"), run(t, b, "two", "--network", "enc")
	address := addressOf(t, to, "enc")
	reach(t, from, address.String())
	docker(t, c, "plugin", "disable", "--force", hosts.PluginName) // its address is the liar's from now on
	key := keyOf(t, b)
	l := newLiar(t, a, c)

	probe := startProbe(t, from, to, address)
	l.tells(t, key)
	known := func(h *hosts.Host, of string) {
		t.Helper()
		tells(t, h, "host liar (", "tells the WireGuard key of "+of)
		refused := "refused, it tells the key of " + of
		for command, want := range map[string]string{"encryption": refused, "peers": "wireguard (" + refused + ")"} {
			if out, err := h.Exec(t.Context(), "weft", command); err != nil || !strings.Contains(out, want) {
				t.Errorf("host %s: weft %s does not say %q: %v\n%s", h.Name, command, want, err, out)
			}
		}
	}
	known(a, "host b")
	known(b, "this host")
	apart := func(when string) {
		t.Helper()
		until(t, a, "knows "+liarsAddress, func(all []endpointView) bool { return seen(all, liarsAddress) })
		for _, h := range []*hosts.Host{a, b} {
			clean(t, h)
			if out, err := h.Exec(t.Context(), "ip", "route", "show", "table", "4796"); err != nil || strings.Contains(out, liarsAddress) {
				t.Errorf("%s, host %s leads to the liar: %v\n%s", when, h.Name, err, out)
			}
		}
		for _, p := range view[encryptionView](t, a, "encryption").Peers {
			if p.Host == "b" && (p.Key != key || p.Addresses != 1) {
				t.Errorf("%s, host a has host b as %+v", when, p)
			}
		}
	}
	apart("while another tells b's key")

	l.tells(t, store.WGKey{9}.String())
	for _, h := range []*hosts.Host{a, b} {
		untold(t, h, "tells the WireGuard key of")
	}
	eventually(t, 20*time.Second, "host a leads to the liar, which has a key of its own", func(ctx context.Context) error {
		out, err := a.Exec(ctx, "ip", "route", "show", "table", "4796")
		if err == nil && !strings.Contains(out, liarsAddress) {
			err = errors.New(out)
		}
		return err
	})
	l.tells(t, key)
	known(a, "host b")
	known(b, "this host")
	apart("told again")
	if out, err := a.Exec(t.Context(), "weft", "encryption", "revoke", "liar"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, h := range []*hosts.Host{a, b} {
		tells(t, h, "host liar (", "is revoked")
		untold(t, h, "tells the WireGuard key of")
	}
	report := lossless(t, probe)
	figure(t, "encrypted: a member tells another host's key", 2, "%d of %d packets between the others lost (target 0); told on both, ended by another key and by revoke", report.Lost, report.Sent)
}

func seen(all []endpointView, address string) bool {
	for _, e := range all {
		if e.IPv4.String() == address {
			return true
		}
	}
	return false
}

// liarsAddress is that of its endpoint.
const liarsAddress = "10.90.200.1"

// liarVariable names the file that makes this program a liar.
const liarVariable = "WEFT_LIAR"

// liar is a member of the cluster without a kernel, at a host's address.
type liar struct {
	peer.Peer
	on   *hosts.Host
	stop func()
}

// newLiar has the networks of one host and the address of another.
func newLiar(t *testing.T, like, on *hosts.Host) *liar {
	return &liar{Peer: peer.Peer{Dir: t.TempDir(), Name: "liar", Address: on.Address, Join: []string{like.Address.String()},
		Key: strings.TrimPrefix(clusterKey, "WEFT_KEY="), Networks: view[[]store.Network](t, like, "networks")}, on: on}
}

// tells starts the liar, anew if it runs, with a WireGuard key.
func (l *liar) tells(t *testing.T, key string) {
	t.Helper()
	if l.stop != nil {
		l.stop()
	}
	file := filepath.Join(l.Dir, "liar.json")
	err := l.Tunnel.UnmarshalText([]byte(key))
	raw, err2 := json.Marshal(l.Peer)
	program, err3 := os.Executable()
	if err := errors.Join(err, err2, err3, os.WriteFile(file, raw, 0o600)); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	cmd := l.on.Command(ctx, "env", liarVariable+"="+file, program)
	cmd.Stderr, cmd.WaitDelay = &out, time.Second
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		_ = cmd.Wait() // it was killed
	}()
	l.stop = func() {
		cancel()
		<-over
		if out.Len() > 0 {
			t.Errorf("the liar ended: %s", out.String())
		}
	}
	t.Cleanup(l.stop)
}

// lie is the process of a liar.
func lie(file string) error {
	var m peer.Peer
	if err := peer.Read(file, &m); err != nil {
		return err
	}
	return m.Run(context.Background(), func(tx *store.Tx, n store.Network) error {
		_, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID(fmt.Sprintf("%064x", n.VNI)), Network: n.ID, VNI: n.VNI, MAC: store.DeriveMAC("liar"),
			IPv4: netip.PrefixFrom(netip.MustParseAddr(liarsAddress), 16)})
		return err
	})
}
