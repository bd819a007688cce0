package kernel_test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// TestFirewalldIsRead: the rules of firewalld 1.3.3 and 2.1.1, as nft(8) lists them.
func TestFirewalldIsRead(t *testing.T) {
	kerneltest.Netns(t)
	k := newKernel(t, kernel.Config{})
	const reject = "reject with icmpx admin-prohibited"
	for _, c := range []struct {
		what, chain, rules string
		rejects            bool
	}{
		{"no zone of ours", "filter_FORWARD_ZONES", "goto filter_FWD_public", true},
		{"trusted by default", "filter_FORWARD_ZONES", "goto filter_FWD_trusted", false},
		{"another link is trusted", "filter_FORWARD_ZONES", `iifname "eth9" goto filter_FWD_trusted; goto filter_FWD_public`, true},
		{"a zone of ours", "filter_FORWARD_ZONES", `iifname "weft*" goto filter_FWD_weft; goto filter_FWD_public`, false},
		{"2: no zone of ours", "filter_FORWARD_POLICIES", "jump filter_FWD_public; " + reject, true},
		{"2: trusted by default", "filter_FORWARD_POLICIES", "jump filter_FWD_trusted; accept", false},
		{"2: another link is trusted", "filter_FORWARD_POLICIES", `iifname "eth9" jump filter_FWD_trusted; iifname "eth9" accept; jump filter_FWD_public; ` + reject, true},
		{"2: a zone of ours", "filter_FORWARD_POLICIES", `iifname "weft*" jump filter_FWD_weft; iifname "weft*" accept; jump filter_FWD_public; ` + reject, false},
	} {
		var chains strings.Builder
		for _, zone := range []string{"public", "trusted", "weft"} {
			chains.WriteString("chain filter_FWD_" + zone + " { }\n")
		}
		load := exec.CommandContext(t.Context(), "nft", "-f", "-")
		load.Stdin = strings.NewReader("add table inet firewalld\ndelete table inet firewalld\ntable inet firewalld {\n" + chains.String() + "chain " + c.chain + " { " + c.rules + "; }\n}\n")
		if out, err := load.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
		if f, err := k.Firewalld(t.Context()); err != nil || f.Zones != c.rejects || f.ReversePath {
			t.Errorf("%s: %+v, %v", c.what, f, err)
		}
	}
}
