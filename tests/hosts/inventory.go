package hosts

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Inventory is what a host holds, by kind, one line per thing, sorted. Two of
// them show what an experiment left behind.
type Inventory map[string][]string

// TakeInventory reads the host: links, routes, routing rules, FDB entries and neighbours of our
// links, iptables rules and chains and sets of ours, mounts, network namespaces,
// and the plugin's open files. Docker itself keeps docker_gwbridge for ever, and
// the network namespace of a removed container for a minute.
func (h *Host) TakeInventory(ctx context.Context) (Inventory, error) {
	inv := Inventory{}
	for _, q := range []struct {
		kind string
		keep func(string) bool
		args []string
	}{
		{"link", all, []string{"ip", "-brief", "link", "show"}},
		{"route", all, []string{"ip", "-4", "route", "show", "table", "all"}},
		{"route6", all, []string{"ip", "-6", "route", "show", "table", "all"}},
		{"routing rule", all, []string{"sh", "-c", "ip -4 rule && ip -6 rule"}},
		{"fdb", ours, []string{"bridge", "fdb", "show"}},
		{"neighbour", ours, []string{"ip", "neighbour", "show", "nud", "permanent"}},
		{"rule", ours, []string{"iptables-save"}},
		{"rule6", ours, []string{"ip6tables-save"}},
		{"rule nft", ours, []string{"iptables-nft-save"}},
		{"rule legacy", ours, []string{"iptables-legacy-save"}},
		{"set", ours, []string{"ipset", "save"}},
		{"namespace", all, []string{"ls", "/run/docker/netns"}},
	} {
		out, err := h.Exec(ctx, q.args...)
		if err != nil && !(q.kind == "namespace" || strings.HasPrefix(q.kind, "rule ")) {
			return nil, err
		}
		inv[q.kind] = lines(out, q.keep)
	}
	mounts, err := mountsUnder(strconv.Itoa(h.holder.Process.Pid), "/")
	if err != nil {
		return nil, err
	}
	slices.Sort(mounts)
	// Another lab that ends may take the covered folders away.
	inv["mount"] = slices.DeleteFunc(mounts, func(m string) bool { return slices.Contains(covered(), m) })
	if pid, err := h.PluginPID(ctx, ""); err == nil {
		inv["plugin file"] = openFiles(pid)
	}
	return inv, ctx.Err() // a command that was cut off saw nothing
}

func all(string) bool { return true }

func ours(line string) bool { return strings.Contains(strings.ToLower(line), "weft") }

// noise is what differs between two looks at the same thing: packet counters,
// numbers of links, and the carrier's moment.
var noise = regexp.MustCompile(`\[\d+:\d+\] ?|@if\d+|,?(LOWER_UP|NO-CARRIER)`)

func lines(text string, keep func(string) bool) []string {
	var out []string
	for line := range strings.Lines(text) {
		line = strings.Join(strings.Fields(noise.ReplaceAllString(line, "")), " ")
		if line != "" && line[0] != '#' && keep(line) {
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return out
}

// openFiles returns the kinds of a process's file descriptors.
func openFiles(pid int) []string {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(dir)
	var out []string
	for _, e := range entries {
		if to, err := os.Readlink(dir + "/" + e.Name()); err == nil {
			out = append(out, strings.Split(to, ":[")[0]) // socket:[123] is a socket
		}
	}
	slices.Sort(out)
	return out
}

// Diff lists what came (+) and went (-) from one inventory to the next, a line
// each; empty when nothing did.
func (a Inventory) Diff(b Inventory) string {
	kinds := make([]string, 0, len(a))
	for k := range a {
		kinds = append(kinds, k)
	}
	slices.Sort(kinds)
	var out strings.Builder
	for _, k := range kinds {
		gone, came := difference(a[k], b[k]), difference(b[k], a[k])
		for _, s := range gone {
			fmt.Fprintf(&out, "- %s: %s\n", k, s)
		}
		for _, s := range came {
			fmt.Fprintf(&out, "+ %s: %s\n", k, s)
		}
	}
	return out.String()
}

// difference returns what a has more often than b.
func difference(a, b []string) []string {
	count := map[string]int{}
	for _, s := range b {
		count[s]++
	}
	var out []string
	for _, s := range a {
		if count[s]--; count[s] < 0 {
			out = append(out, s)
		}
	}
	return out
}

// Counts is one line with the number of things of each kind.
func (a Inventory) Counts() string {
	var parts []string
	for k, v := range a {
		parts = append(parts, fmt.Sprintf("%s %d", k, len(v)))
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}
