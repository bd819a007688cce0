package tests

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// counter is what differs between two listings of the same things.
var counter = regexp.MustCompile(`\[\d+:\d+\] ?`)

// What the plugin keeps on a host, by part; %B is the bridge, %I the backend.
var keptParts = map[string]string{
	"rules":  "iptables-%I-save | grep -i weft",
	"rules6": "ip6tables-%I-save | grep -i weft",
	"sets":   "ipset save | grep weft",
	// Without the multicast groups that the kernel joins as it likes.
	"entries": "bridge fdb show | grep weft | grep -v ^33:33: | grep -v ^01:00:5e:; ip neighbour show nud permanent | grep weft",
	"links": `cd /sys/class/net; for l in weft*; do
		echo $l $(cat $l/ifalias $l/mtu $l/address $l/flags) $(readlink $l/master) $(cat $l/brport/learning $l/brport/neigh_suppress 2>/dev/null)
	done`,
	"program": `for m in settings ports dests peers services; do bpftool map dump pinned /sys/fs/bpf/weft-*/weft_$m; done
		bpftool -j map dump pinned /sys/fs/bpf/weft-*/weft_counters | tr '{' '\n' | grep -o '^"key":[^]]*'
		for l in weftv eth; do for d in $(cd /sys/class/net; ls -d $l*); do tc filter show dev $d ingress; done; done`,
	"routes":     "for f in -4 -6; do ip $f route show table 4796; ip $f rule show pref 4796; ip $f rule show pref 4797; done",
	"encryption": "weft encryption | awk '{ print $1, $2, $3, $NF }' | grep weftw",
	"addresses":  "ip -o -4 address show | grep weft",
	"sysctls":    "cd /proc/sys/net; grep . ipv4/conf/%B/rp_filter ipv4/conf/%B/arp_ignore ipv6/conf/%B/disable_ipv6",
}

// kept lists what the plugin keeps on a host, by the host's own tools: weft audit repairs
// what it finds. Only the parts named, since each costs processes.
func kept(ctx context.Context, h *hosts.Host, backend, bridge, parts string) (string, error) {
	var script []string
	for part := range strings.FieldsSeq(parts) {
		script = append(script, keptParts[part])
	}
	text := strings.NewReplacer("%B", bridge, "%I", backend).Replace(strings.Join(script, "\n") + "\ntrue")
	out, err := h.Exec(ctx, "sh", "-c", text)
	var lines []string
	for line := range strings.Lines(out) {
		lines = append(lines, strings.TrimSpace(counter.ReplaceAllString(line, "")))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n"), err
}

// repaired runs a command that damages parts of what is kept on a host, and waits until
// all is as before.
func repaired(t *testing.T, h *hosts.Host, parts, damage string) {
	t.Helper()
	backend := view[statusView](t, h, "status").IPTables
	before, err := kept(t.Context(), h, backend, "", parts)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := h.Exec(t.Context(), "sh", "-c", damage); err != nil {
		t.Fatalf("%s: %v %s", damage, err, out)
	}
	eventually(t, eventLimit+10*time.Second, "repaired after "+damage, func(ctx context.Context) error {
		now, err := kept(ctx, h, backend, "", parts)
		if err == nil && now != before {
			err = errors.New(difference(before, now))
		}
		return err
	})
	if out, err := h.Exec(t.Context(), "weft", "audit", "--settle", "5s"); err != nil {
		t.Errorf("%s: %v\n%s", damage, err, out)
	}
}

func difference(before, now string) string {
	a, b := strings.Split(before, "\n"), strings.Split(now, "\n")
	var out strings.Builder
	for _, line := range a {
		if !slices.Contains(b, line) {
			fmt.Fprintln(&out, "-", line)
		}
	}
	for _, line := range b {
		if !slices.Contains(a, line) {
			fmt.Fprintln(&out, "+", line)
		}
	}
	if out.Len() == 0 {
		return fmt.Sprintf("another number of lines:\n%s", now)
	}
	return out.String()
}
