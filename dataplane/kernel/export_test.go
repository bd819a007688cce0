package kernel

import (
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft/dataplane/kernel/bpf"
)

// ClearDests makes the port program know no destination.
func (k *Kernel) ClearDests(t *testing.T) {
	t.Helper()
	if err := clearMap[bpf.ProgramDestKey, bpf.ProgramDest](k.program.objects.WeftDests); err != nil {
		t.Fatal(err)
	}
}

// Configure changes a WireGuard device as wg(8) would.
func (k *Kernel) Configure(t *testing.T, device string, c wgtypes.Config) {
	t.Helper()
	if err := k.tunnels.configure(device, c); err != nil {
		t.Fatal(err)
	}
}

// Peer returns the state of a device's peer.
func (k *Kernel) Peer(t *testing.T, device string, key wgtypes.Key) wgtypes.Peer {
	t.Helper()
	d, err := k.tunnels.device(device)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range d.Peers {
		if p.PublicKey == key {
			return p
		}
	}
	t.Fatalf("device %s has no peer %s", device, key)
	return wgtypes.Peer{}
}
