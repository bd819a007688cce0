package tests

import (
	"net"
	"testing"

	"github.com/weftnet/weft/tests/hosts"
)

// TestEncryptedRefused asks for an encrypted network where there can be no WireGuard
// device: Docker says why, nothing is left, and once the reason is gone it is there.
func TestEncryptedRefused(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 1, nil)
	h := lab.Hosts[0]
	install(t, lab, pluginDir(t, "", "test"), clusterKey)
	create := []string{"network", "create", "-d", hosts.PluginName, "--subnet", "10.90.0.0/24", "-o", "encrypted", "enc"}
	none := func(why ...string) {
		t.Helper()
		first := inventories(t, h)[0]
		refused(t, h, why, create...)
		if all := view[[]networkView](t, h, "networks"); len(all) > 0 {
			t.Errorf("a refused network left records: %+v", all)
		}
		if out := docker(t, h, "network", "ls", "--quiet", "--filter", "name=enc"); out != "" {
			t.Errorf("a refused network is in Docker: %s", out)
		}
		clean(t, h)
		unleaked(t, h, first, "plugin file")
	}
	works := func() {
		t.Helper()
		docker(t, h, create...)
		one, two := run(t, h, "one", "--network", "enc"), run(t, h, "two", "--network", "enc")
		reach(t, one, addressOf(t, two, "enc").String())
		removeOthers(t, h)
		docker(t, h, "network", "rm", "enc")
	}

	var taken net.PacketConn
	if err := hosts.InNetNS(h.NetNS(), func() (err error) {
		taken, err = net.ListenPacket("udp", ":4798")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	none("UDP port 4798 of WireGuard is in use by another program", "WEFT_WIREGUARD_PORT")
	_ = taken.Close()
	works()

	if _, err := h.Exec(t.Context(), "ip", "link", "add", "probe0", "type", "wireguard"); err == nil {
		t.Log("this kernel has WireGuard, so it cannot be told that it has none")
		_, _ = h.Exec(t.Context(), "ip", "link", "del", "probe0")
		return
	}
	set := func(how string) {
		docker(t, h, "plugin", "disable", "--force", hosts.PluginName)
		docker(t, h, "plugin", "set", hosts.PluginName, "WEFT_WIREGUARD="+how)
		docker(t, h, "plugin", "enable", hosts.PluginName)
	}
	set("kernel")
	none("this kernel has no WireGuard", "modprobe wireguard", "WEFT_WIREGUARD=kernel")
	set("auto")
	works()
	figure(t, "encrypted: network refused where there can be no WireGuard device", 2, "with the reason, nothing left; made once there can be one")
}
