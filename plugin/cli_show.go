package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weftnet/weft/store"
)

func status(ctx context.Context, c *cli) error {
	s, err := ask[statusReply](ctx, &c.admin, "/v1/status")
	if err != nil {
		return err
	}
	var v swarmView
	if s.Ready {
		v = c.askSwarm(ctx, s)
		s.Problems = append(v.current(s.Problems), v.problems()...)
		slices.SortStableFunc(s.Problems, func(a, b problem) int { return cmp.Compare(rank(a), rank(b)) })
	}
	wrong := slices.ContainsFunc(s.Problems, func(p problem) bool { return !p.Advice })
	if !c.print(s) {
		printProblems(c, s.Problems, wrong)
		printStatus(c, s, v.text())
	}
	if wrong {
		return errFound
	}
	return nil
}

// rank puts advice last.
func rank(p problem) int {
	if p.Advice {
		return 1
	}
	return 0
}

func printProblems(c *cli, all []problem, wrong bool) {
	if !wrong {
		fmt.Fprintln(c.out, "weft is well")
	}
	for _, p := range all {
		mark := "! "
		if p.Advice {
			mark = "  note: "
		}
		fmt.Fprintf(c.out, "%s%s\n", mark, p.Text)
		if p.Remedy != "" {
			fmt.Fprintf(c.out, "      %s\n", p.Remedy)
		}
	}
	fmt.Fprintln(c.out)
}

func printStatus(c *cli, s statusReply, swarm string) {
	rows := [][]string{{"version", fmt.Sprintf("%s, since %s", s.Version, clock(s.Started))}}
	if !s.Ready {
		c.table(rows)
		return
	}
	rows = append(rows,
		[]string{"host", fmt.Sprintf("%s (%s)", s.Host.Name, s.Host.ID)},
		[]string{"underlay", underlayText(s.Underlay)},
		[]string{"iptables", orDash(s.IPTables)},
		[]string{"program", orDash(s.Program)},
		[]string{"hosts", clusterText(s)},
	)
	for _, d := range s.Tunnels {
		rows = append(rows, []string{"encryption", fmt.Sprintf("%s by %s, UDP port %d", d.Name, by(d.Module), d.Port)})
	}
	if swarm != "" {
		rows = append(rows, []string{"swarm", swarm})
	}
	rows = append(rows,
		[]string{"networks", fmt.Sprintf("%d, with %d endpoints here and %d on peers", s.Records.Networks, s.Records.Endpoints, s.Records.Remote)},
		[]string{"addresses", fmt.Sprintf("%d in %d pools of Weft's IPAM", s.Records.Leases, s.Records.Pools)},
		[]string{"kernel", fmt.Sprintf("%d changes in %d passes, %d of them failed", s.Loop.Ops, s.Loop.Passes, s.Loop.Failures)},
	)
	if len(s.Loop.Repaired) > 0 {
		var parts []string
		for _, k := range slices.Sorted(maps.Keys(s.Loop.Repaired)) {
			parts = append(parts, fmt.Sprintf("%d %s", s.Loop.Repaired[k], k))
		}
		rows = append(rows, []string{"repaired", strings.Join(parts, ", ") + ": changed by something else"})
	}
	c.table(rows)
}

func underlayText(u underlayReply) string {
	if !u.Address.IsValid() {
		return "none"
	}
	s := fmt.Sprintf("%s on %s, mtu %d", u.Address, u.Link, u.MTU)
	if u.NoChecksum != "" {
		s += "; checksum offload of VXLAN is off: " + u.NoChecksum
	}
	return s
}

func clusterText(s statusReply) string {
	if s.Records.PeersAlive+s.Records.PeersDead+s.Records.PeersHidden == 0 {
		switch {
		case s.Swarm.Self.IsValid() && len(s.Swarm.Discovered) == 0:
			return "this one alone in its Swarm"
		case len(s.Join)+len(s.Swarm.Discovered) == 0:
			return "this one alone; WEFT_JOIN names others"
		}
	}
	text := fmt.Sprintf("others: %d alive, %d silent", s.Records.PeersAlive, s.Records.PeersDead+s.Records.PeersHidden)
	if s.Encrypted {
		return text + "; gossip and records are encrypted"
	}
	return text + "; gossip is not encrypted"
}

func networks(ctx context.Context, c *cli) error {
	all, err := ask[[]networkReply](ctx, &c.admin, "/v1/networks")
	if err != nil || c.print(all) {
		return err
	}
	names := c.docker.names(ctx)
	rows := [][]string{{"NETWORK", "NAME", "VNI", "SUBNETS", "MTU", "BRIDGE", "HERE", "PEERS", "ON", "STATE"}}
	for _, n := range all {
		state := "ok"
		switch {
		case n.Status.Err != "":
			state = "fails: " + firstLines(n.Status.Err, 1)
		case n.Status.LastPass.IsZero():
			state = "not looked at yet"
		case n.Status.Held != "":
			state = "waits: " + n.Status.Held
		case len(n.Disagree) > 0:
			state = "other subnets on " + strings.Join(n.Disagree, ", ")
		}
		rows = append(rows, []string{short(n.ID), orDash(names[n.ID]), strconv.Itoa(int(n.VNI)), join(n.Prefixes()),
			strconv.Itoa(n.EffectiveMTU), orDash(n.Bridge), strconv.Itoa(n.Endpoints), strconv.Itoa(n.Remote), orDash(strings.Join(n.Peers, ",")), state})
	}
	c.table(rows)
	return nil
}

func endpoints(ctx context.Context, c *cli) error {
	all, err := ask[[]endpointReply](ctx, &c.admin, "/v1/endpoints")
	if err != nil || c.print(all) {
		return err
	}
	names := c.docker.containers(ctx)
	rows := [][]string{{"ENDPOINT", "CONTAINER", "VNI", "ADDRESS", "MAC", "HOST", "STATE", "LINK"}}
	for _, e := range all {
		rows = append(rows, []string{short(e.ID), orDash(names[e.ID]), strconv.Itoa(int(e.VNI)), orDash(addresses(e.IPv4, e.IPv6)),
			e.MAC.String(), e.Host, e.State, e.Link})
	}
	c.table(rows)
	return nil
}

// ports lists what docker ps does not: Docker publishes nothing where the gateway is ours.
func ports(ctx context.Context, c *cli) error {
	all, err := ask[[]endpointReply](ctx, &c.admin, "/v1/endpoints")
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(e endpointReply) bool { return len(e.Ports) == 0 })
	if c.print(all) {
		return nil
	}
	names := c.docker.containers(ctx)
	rows := [][]string{{"PORT", "CONTAINER", "ENDPOINT", "ADDRESS"}}
	for _, e := range all {
		for _, p := range e.Ports {
			rows = append(rows, []string{p.String(), orDash(names[e.ID]), short(e.ID), orDash(addresses(e.IPv4, e.IPv6))})
		}
	}
	c.table(rows)
	return nil
}

func peers(ctx context.Context, c *cli) error {
	all, err := ask[[]peerReply](ctx, &c.admin, "/v1/peers")
	if err != nil || c.print(all) {
		return err
	}
	rows := [][]string{{"HOST", "ID", "ADDRESS", "WAY", "VERSION", "STATE", "NETWORKS", "ERROR"}}
	for _, p := range all {
		state := "alive, being read"
		switch {
		case p.Hidden:
			state = "silent since " + clock(p.DeadSince) + ", hidden"
		case !p.Alive:
			state = "silent since " + clock(p.DeadSince)
		case p.Cut:
			state = "alive, not reached from here"
		case p.InSync:
			state = "alive"
		}
		rows = append(rows, []string{p.Name, short(p.ID), cmp.Or(p.Via, p.Address).String(), p.Way, p.Version, state, orDash(join(p.Networks)), p.LastErr})
	}
	c.table(rows)
	return nil
}

func pools(ctx context.Context, c *cli) error {
	all, err := ask[[]poolReply](ctx, &c.admin, "/v1/ipam")
	if err != nil || c.print(all) {
		return err
	}
	rows, leases := [][]string{{"POOL", "RANGE", "SPACE", "USED", "COOLING", "OF"}}, [][]string{{"ADDRESS", "POOL", "KIND", "TAKEN", "FOR"}}
	for _, p := range all {
		sub := "-"
		if p.Sub.IsValid() {
			sub = p.Sub.String()
		}
		rows = append(rows, []string{p.Prefix.String(), sub, p.Space, strconv.Itoa(p.Used), strconv.Itoa(p.Cooling), fmt.Sprint(p.Total)})
		for _, l := range p.Leases {
			kind := l.Kind
			if !l.Freed.IsZero() {
				kind = "cooling"
			}
			leases = append(leases, []string{l.Address.String(), p.Prefix.String(), kind, l.Taken.UTC().Format(time.DateTime), l.Tag})
		}
	}
	c.table(rows)
	if len(leases) > 1 {
		fmt.Fprintln(c.out)
		c.table(leases)
	}
	return nil
}

func versions(ctx context.Context, c *cli) error {
	v, err := ask[versionReply](ctx, &c.admin, "/v1/version")
	own := versionReply{Version: buildVersion(), Go: runtime.Version()}
	reply := struct {
		Command versionReply  `json:"command"`
		Plugin  *versionReply `json:"plugin"` // null when it does not run
	}{Command: own}
	if err == nil {
		reply.Plugin = &v
	}
	if c.print(reply) {
		return nil
	}
	fmt.Fprintf(c.out, "command  %s (%s)\n", own.Version, own.Go)
	if err != nil {
		fmt.Fprintf(c.out, "plugin   unknown: %s\n", oneLine(err))
		return nil
	}
	fmt.Fprintf(c.out, "plugin   %s (%s)\n", v.Version, v.Go)
	if v.Version != own.Version {
		fmt.Fprintln(c.out, "they differ; the plugin's own command comes with: weft install, run from its root file system")
	}
	return nil
}

func short[T ~string](id T) string { return string(id[:min(len(id), 12)]) }

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func join[T any](all []T) string {
	parts := make([]string, 0, len(all))
	for _, v := range all {
		parts = append(parts, fmt.Sprint(v))
	}
	return strings.Join(parts, ",")
}

func addresses(all ...netip.Addr) string {
	return join(slices.DeleteFunc(all, func(a netip.Addr) bool { return !a.IsValid() }))
}

// networkName returns how a network is called in texts.
func networkName(id store.NetworkID, v store.VNI, names map[store.NetworkID]string) string {
	name := cmp.Or(names[id], short(id))
	switch {
	case v == store.HostVNI && id == "":
		return "host"
	case v == store.HostVNI:
		return "network " + name
	case id == "":
		return fmt.Sprintf("vni %d", v)
	}
	return fmt.Sprintf("network %s (vni %d)", name, v)
}
