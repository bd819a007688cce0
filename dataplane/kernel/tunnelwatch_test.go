package kernel

import (
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// fakeModule is a client of a module with one device.
type fakeModule struct {
	mu     sync.Mutex
	device wgtypes.Device
	looks  int
	put    []wgtypes.Config
}

func (f *fakeModule) Device(string) (*wgtypes.Device, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.looks++
	d := f.device
	d.Peers = slices.Clone(d.Peers)
	return &d, nil
}

func (f *fakeModule) ConfigureDevice(_ string, c wgtypes.Config) error {
	f.put = append(f.put, c)
	return nil
}

func (f *fakeModule) Close() error { return nil }

func (f *fakeModule) change(fn func(*wgtypes.Device)) (looks int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(&f.device)
	return f.looks
}

// fakeTunnel returns a kernel whose module has the device weftw0 with two peers. Routes
// of the networks 7 and 8 lead to an address of each.
func fakeTunnel(t *testing.T) (*Kernel, *fakeModule) {
	t.Helper()
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	k, err := New(Config{Backend: "nft"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	kerneltest.Script(t, `
		ip route add 10.7.0.2 dev under0 table 4796 proto 119 metric 7
		ip -6 route add fd08::2 dev under0 table 4796 proto 119 metric 8`)
	peer := func(n byte, prefix string) wgtypes.Peer {
		_, allowed, err := net.ParseCIDR(prefix)
		if err != nil {
			t.Fatal(err)
		}
		return wgtypes.Peer{PublicKey: wgtypes.Key{n}, PersistentKeepaliveInterval: keepaliveTime, AllowedIPs: []net.IPNet{*allowed}}
	}
	f := &fakeModule{device: wgtypes.Device{PrivateKey: wgtypes.Key{1}, ListenPort: 4798, Peers: []wgtypes.Peer{peer(1, "10.7.0.2/32"), peer(2, "fd08::2/128")}}}
	_ = k.tunnels.module.client.Close()
	k.tunnels.module.client, k.tunnels.module.there = f, func(name string) bool { return name == "weftw0" }
	return k, f
}

// What somebody does to a WireGuard device with wg(8) is seen, and what only time changes
// is not.
func TestChangedDevices(t *testing.T) {
	k, f := fakeTunnel(t)
	for _, c := range []struct {
		name   string
		change func(*wgtypes.Device)
		want   []store.VNI
	}{
		{"handshake, counters, endpoint", func(d *wgtypes.Device) {
			d.Peers[0].LastHandshakeTime, d.Peers[0].ReceiveBytes, d.Peers[0].TransmitBytes = time.Now(), 7, 8
			d.Peers[0].Endpoint = &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
		}, nil},
		{"other order", func(d *wgtypes.Device) { slices.Reverse(d.Peers) }, nil},
		{"key", func(d *wgtypes.Device) { d.PrivateKey = wgtypes.Key{9} }, []store.VNI{0}},
		{"port", func(d *wgtypes.Device) { d.ListenPort = 1 }, []store.VNI{0}},
		{"preshared key", func(d *wgtypes.Device) { d.Peers[0].PresharedKey = wgtypes.Key{9} }, []store.VNI{0}},
		{"keepalive", func(d *wgtypes.Device) { d.Peers[0].PersistentKeepaliveInterval = 0 }, []store.VNI{0}},
		{"peer removed", func(d *wgtypes.Device) { d.Peers = d.Peers[1:] }, []store.VNI{0, 7}},
		{"peer removed, of IPv6", func(d *wgtypes.Device) { d.Peers = d.Peers[:1] }, []store.VNI{0, 8}},
		{"peer added", func(d *wgtypes.Device) { d.Peers = append(d.Peers, wgtypes.Peer{PublicKey: wgtypes.Key{3}}) }, []store.VNI{0}},
		{"nothing allowed", func(d *wgtypes.Device) { d.Peers[0].AllowedIPs = nil }, []store.VNI{7}},
		{"allowed to another", func(d *wgtypes.Device) {
			d.Peers[1].AllowedIPs, d.Peers[0].AllowedIPs = slices.Concat(d.Peers[1].AllowedIPs, d.Peers[0].AllowedIPs), nil
		}, []store.VNI{7}},
		{"allowed without a route", func(d *wgtypes.Device) {
			_, all, _ := net.ParseCIDR("0.0.0.0/0")
			d.Peers[0].AllowedIPs = append(slices.Clone(d.Peers[0].AllowedIPs), *all)
		}, []store.VNI{0}},
	} {
		before := f.device
		before.Peers = slices.Clone(f.device.Peers)
		was := k.sight("weftw0")
		f.change(c.change)
		got := k.touched(was, k.sight("weftw0"))
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
		f.device = before
	}
	if s := k.sight("weftw1"); s != nil {
		t.Error("a device that is not there is seen")
	}
	if got := append(k.touched(nil, k.sight("weftw0")), k.touched(k.sight("weftw0"), nil)...); len(got) != 0 {
		t.Errorf("a device comes and goes: %v; the kernel tells of its link", got)
	}
}

// Watch tells within seconds that a peer was removed, and nothing while time passes.
func TestWatchSeesChangedDevice(t *testing.T) {
	k, f := fakeTunnel(t)
	events := k.Watch(t.Context())
	await := func(looks int) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); f.change(func(*wgtypes.Device) {}) < looks; {
			if time.Now().After(deadline) {
				t.Fatal("nobody looks at the device")
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	await(1)
	await(1 + f.change(func(d *wgtypes.Device) { d.Peers[0].LastHandshakeTime = time.Now() }))
	f.change(func(d *wgtypes.Device) { d.Peers = d.Peers[1:] })
	var got []store.VNI
	for len(got) < 2 {
		select {
		case v := <-events:
			got = append(got, v)
		case <-time.After(10 * time.Second):
			t.Fatalf("only %v were told of", got)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, []store.VNI{0, 7}) {
		t.Errorf("told of %v", got)
	}
}

// To try the next endpoint of many silent peers the devices are read once, not once for
// each: with a thousand that was their number squared, in each pass.
func TestManyPeersAreReadOnce(t *testing.T) {
	k, f := fakeTunnel(t)
	var ops []dataplane.Op
	for n := range 100 {
		o := dataplane.TunnelPeer{Device: "weftw0", Public: store.WGKey{3, byte(n)}, Endpoints: "192.0.2.1:1,192.0.2.1:2"}
		ops = append(ops, dataplane.Op{Verb: dataplane.Put, Object: o, Old: o})
		f.device.Peers = append(f.device.Peers, wgtypes.Peer{PublicKey: wgtypes.Key(o.Public), Endpoint: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}})
	}
	for _, err := range k.Apply(t.Context(), ops) {
		t.Error(err)
	}
	if f.looks > len(dataplane.TunnelNames) {
		t.Errorf("the devices were read %d times", f.looks)
	}
	if len(f.put) != len(ops) {
		t.Fatalf("%d changes, want %d", len(f.put), len(ops))
	}
	for _, c := range f.put {
		if at := c.Peers[0].Endpoint; at == nil || at.Port != 2 {
			t.Errorf("peer %s is sought at %v, want the other endpoint", c.Peers[0].PublicKey, at)
		}
	}
}
