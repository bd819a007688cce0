package kernel

import (
	"encoding/binary"
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// On a host whose kernel has IPv6 off, rules of IPv6 count as done, and nothing of
// them reaches iptables.
func TestHostWithoutIPv6(t *testing.T) {
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	k, err := New(Config{Backend: "nft"})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	k.rules.ipv6Off = func() bool { return true }
	for _, want := range []dataplane.Plan{kerneltest.Examples()[0].HostPlan(), {}} {
		for n := range 2 {
			have, err := k.Read(t.Context(), 0)
			if err != nil {
				t.Fatal(err)
			}
			ops := dataplane.Diff(want, have)
			for _, err := range k.Apply(t.Context(), ops) {
				t.Error(err)
			}
			if n == 1 && len(ops) != 0 {
				t.Errorf("still to do: %v", ops)
			}
		}
	}
	if out := kerneltest.Run(t, "ip6tables-nft-save"); out != "" {
		t.Errorf("rules of IPv6 were made: %s", out)
	}
}

func TestOldKernel(t *testing.T) {
	for release, want := range map[string]bool{"5.4.0-90-generic": true, "4.18.0-477.el8": true, "5.7.0": false, "5.10.0-8-amd64": false, "6.18.44": false, "": false, "odd": false} {
		if got := oldKernel(release); got != want {
			t.Errorf("%q: %t", release, got)
		}
	}
}

func TestChainHash(t *testing.T) {
	rules := func(specs ...string) []rule {
		var out []rule
		for _, s := range specs {
			out = append(out, rule{spec: s})
		}
		return out
	}
	one, two := `-p udp -m comment --comment "weft 0123456789ab 1/2" -j DROP`, `-m comment --comment "weft 0123456789ab 2/2" -j DROP`
	for _, c := range []struct {
		rules []rule
		want  string
	}{
		{rules(one, two), "0123456789ab"},
		{rules(two, one), broken},
		{rules(one), broken},
		{rules(one, two, two), broken},
		{rules("-j ACCEPT", one, two), broken},
		{rules(one, `-m comment --comment "weft aaaaaaaaaaaa 2/2" -j DROP`), broken},
		{nil, dataplane.NewChain("filter", false, "WEFT-X").Hash},
	} {
		if got := chainHash("filter", false, "WEFT-X", c.rules); got != c.want {
			t.Errorf("%v: %s, want %s", c.rules, got, c.want)
		}
	}
}

func TestParseRules(t *testing.T) {
	rs, err := parseRules("*security\n:WEFT-NAT - [0:0]\nCOMMIT\n*filter\n:FORWARD DROP [1:2]\n:WEFT-F - [0:0]\n" +
		"-A FORWARD -m comment --comment \"a \\\"-j\\\" WEFT-X\" -j WEFT-F\n-A FORWARD -j ACCEPT\nCOMMIT\n")
	if err != nil || len(rs) != 1 || len(rs["filter"]["FORWARD"]) != 2 || rs["filter"]["FORWARD"][0].target != "WEFT-F" {
		t.Errorf("%v, %v", rs, err)
	}
	if _, err := parseRules("# Table `filter' is incompatible, use 'nft' tool.\n"); err == nil {
		t.Error("a table that cannot be read counts as empty")
	}
}

// Messages of the kernel are data: malformed ones are skipped, not a panic.
func FuzzMessages(f *testing.F) {
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255})
	link := make([]byte, 64)
	binary.NativeEndian.PutUint32(link, 64)
	binary.NativeEndian.PutUint16(link[4:], 16)
	f.Add(link)
	f.Fuzz(func(_ *testing.T, b []byte) {
		w := &watch{k: &Kernel{}, links: map[int32]seen{}}
		for m := range messages(b) {
			_ = m.err()
			w.routeEvent(m)
			ruleEvent(m)
			parseLink(m.data)
			parseEntry(m.data)
		}
	})
}
