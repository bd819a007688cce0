package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

const (
	betweenDocker = "Docker, records"
	betweenLeases = "Docker, leases"
	// settlePause is the pause between two looks of audit --settle.
	settlePause = 250 * time.Millisecond
)

// audit compares Docker, records and kernel. Docker is asked from here, on the
// host: the plugin has no access to it.
func audit(c *cli) func(context.Context, []string) error {
	settle := c.flags.Duration("settle", 0, "look again until there is no difference, for at most so long (as 5s)")
	asked := c.flags.Bool("docker", true, "ask Docker too")
	return func(ctx context.Context, args []string) error {
		if len(args) > 0 {
			return usageError(fmt.Sprintf("takes no argument, got %.60q", args[0]))
		}
		deadline := time.Now().Add(*settle)
		for {
			found, names, err := auditOnce(ctx, c, *asked)
			if err == nil && len(found.Differences) == 0 || time.Now().After(deadline) {
				return c.report(found, names, *asked, err)
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(settlePause):
			}
		}
	}
}

func (c *cli) report(found auditReply, names map[store.NetworkID]string, docker bool, err error) error {
	if err != nil {
		return err
	}
	if !c.print(found) {
		for _, d := range found.Differences {
			if d.Between == betweenLeases && d.Network == "" {
				fmt.Fprintf(c.out, "%s: %s\n", d.Between, d.Text)
				continue
			}
			fmt.Fprintf(c.out, "%s: %s: %s\n", d.Between, networkName(d.Network, d.VNI, names), d.Text)
		}
		switch {
		case len(found.Differences) > 0:
			fmt.Fprintf(c.out, "%d differences\n", len(found.Differences))
		case docker:
			fmt.Fprintln(c.out, "no difference: Docker, records and kernel agree")
		default:
			fmt.Fprintln(c.out, "no difference: records and kernel agree; Docker was not asked")
		}
	}
	if len(found.Differences) > 0 {
		return errFound
	}
	return nil
}

func auditOnce(ctx context.Context, c *cli, docker bool) (auditReply, map[store.NetworkID]string, error) {
	found, err := ask[auditReply](ctx, &c.admin, "/v1/audit")
	if err != nil || !docker {
		return found, nil, err
	}
	nets, err := ask[[]networkReply](ctx, &c.admin, "/v1/networks")
	if err != nil {
		return found, nil, err
	}
	eps, err := ask[[]endpointReply](ctx, &c.admin, "/v1/endpoints")
	if err != nil {
		return found, nil, err
	}
	pools, err := ask[[]poolReply](ctx, &c.admin, "/v1/ipam")
	if err != nil {
		return found, nil, err
	}
	plugin := c.docker.pluginName(ctx, c.admin.pluginID())
	theirs, err := c.docker.networks(ctx, func(n dockerNetwork) bool {
		return (n.Driver == plugin || n.IPAM.Driver == plugin) && !n.ConfigOnly
	})
	if err != nil {
		return found, nil, err
	}
	names := map[store.NetworkID]string{}
	for _, n := range theirs {
		names[store.NetworkID(n.ID)] = n.Name
	}
	found.Differences = append(found.Differences, compareNetworks(plugin, theirs, nets, eps)...)
	var swarm swarmUse
	if slices.ContainsFunc(pools, func(p poolReply) bool { return p.Space == ipam.GlobalSpace }) {
		if swarm, err = c.docker.swarmUse(ctx); err != nil {
			return found, nil, err
		}
	}
	found.Differences = append(found.Differences, compareLeases(plugin, theirs, pools, swarm)...)
	return found, names, nil
}

// compareNetworks names the networks and endpoints that only Docker or only the
// records have, and those in which they differ.
func compareNetworks(plugin string, theirs []dockerNetwork, ours []networkReply, eps []endpointReply) []difference {
	var out []difference
	add := func(n store.NetworkID, v store.VNI, format string, args ...any) {
		out = append(out, difference{Between: betweenDocker, Network: n, VNI: v, Text: fmt.Sprintf(format, args...)})
	}
	known := map[store.NetworkID]store.VNI{}
	for _, n := range ours {
		known[n.ID] = n.VNI
		if !slices.ContainsFunc(theirs, func(t dockerNetwork) bool { return t.ID == string(n.ID) && t.Driver == plugin }) {
			add(n.ID, n.VNI, "recorded, but Docker has no such network; if it stays so: weft forget %.12s", n.ID)
		}
	}
	recorded := map[store.EndpointID]endpointReply{}
	for _, e := range eps {
		if e.Local {
			recorded[e.ID] = e
		}
	}
	told := map[store.EndpointID]bool{}
	for _, t := range theirs {
		id := store.NetworkID(t.ID)
		vni, ok := known[id]
		switch {
		case t.Driver != plugin, !ok && t.Scope == "swarm" && len(t.Containers) == 0: // Swarm shows managers networks that run elsewhere
			continue
		case !ok:
			add(id, 0, "Docker has it, but it is not recorded; remove and create it again")
			continue
		}
		for container, d := range t.Containers {
			told[store.EndpointID(d.EndpointID)] = true
			if e, ok := recorded[store.EndpointID(d.EndpointID)]; ok {
				compareEndpoint(d, e, func(text string) { add(id, vni, "%s", text) })
			} else {
				add(id, vni, "endpoint %.12s of container %s is not recorded", d.EndpointID, cmp.Or(d.Name, short(container)))
			}
		}
	}
	for _, e := range eps {
		if e.Local && !told[e.ID] {
			add(e.Network, e.VNI, "endpoint %.12s (%s, %s) is recorded, but Docker has none such", e.ID, addresses(e.IPv4, e.IPv6), e.State)
		}
	}
	sortDifferences(out)
	return out
}

func compareEndpoint(d dockerEndpoint, e endpointReply, add func(string)) {
	for _, pair := range [][2]string{
		{withoutBits(d.IPv4Address), addresses(e.IPv4)}, {withoutBits(d.IPv6Address), addresses(e.IPv6)}, {strings.ToLower(d.MacAddress), e.MAC.String()},
	} {
		if pair[0] != pair[1] && pair[0] != "" { // newer engines leave some out
			add(fmt.Sprintf("endpoint %.12s of container %s has %s in Docker, %s in the records", e.ID, d.Name, pair[0], orDash(pair[1])))
		}
	}
	if e.State == "missing" {
		add(fmt.Sprintf("endpoint %.12s of container %s has lost its link; restart the container", e.ID, d.Name))
	}
}

func withoutBits(cidr string) string {
	if p, err := netip.ParsePrefix(cidr); err == nil {
		return p.Addr().String()
	}
	return cidr
}

// owner is the network that Docker gave a pool to.
type owner struct {
	net  store.NetworkID
	used map[netip.Addr]string // by whom
}

type owners map[netip.Prefix]*owner

// take notes the network's pools with what is used of them.
func (all owners) take(t dockerNetwork, used map[netip.Addr]string) {
	for _, conf := range t.IPAM.Config {
		p, err := netip.ParsePrefix(conf.Subnet)
		if err != nil {
			continue
		}
		o := all[p.Masked()]
		if o == nil {
			o = &owner{net: store.NetworkID(t.ID), used: map[netip.Addr]string{}}
			all[p.Masked()] = o
		}
		for name, a := range conf.AuxiliaryAddresses {
			if addr, err := netip.ParseAddr(withoutBits(a)); err == nil {
				o.used[addr] = "auxiliary address " + name
			}
		}
		for addr, who := range used {
			if p.Contains(addr) {
				o.used[addr] = who
			}
		}
	}
}

func containerAddresses(t dockerNetwork) map[netip.Addr]string {
	used := map[netip.Addr]string{}
	for _, c := range t.Containers {
		for _, a := range []string{c.IPv4Address, c.IPv6Address} {
			if addr, err := netip.ParseAddr(withoutBits(a)); err == nil {
				used[addr] = "container " + c.Name
			}
		}
	}
	return used
}

// compareLeases compares the pools of our IPAM with the networks that Docker gave
// them to, whatever their driver. In a Swarm the leader has a second pool per
// network, from which all hosts' addresses come; what another manager has of such
// pools is from when it was the leader.
func compareLeases(plugin string, theirs []dockerNetwork, pools []poolReply, swarm swarmUse) []difference {
	var out []difference
	add := func(n store.NetworkID, format string, args ...any) {
		out = append(out, difference{Between: betweenLeases, Network: n, Text: fmt.Sprintf(format, args...)})
	}
	here, leaders := owners{}, owners{}
	for _, t := range theirs {
		if t.IPAM.Driver != plugin {
			continue
		}
		here.take(t, containerAddresses(t))
		if swarm.active && t.Scope == "swarm" {
			leaders.take(t, swarm.used[store.NetworkID(t.ID)])
		}
	}
	for _, p := range pools {
		owned := here
		if p.Space == ipam.GlobalSpace && swarm.active {
			if !swarm.leader {
				continue
			}
			owned = leaders
		}
		o := owned[p.Prefix]
		if o == nil && p.Former {
			continue // it goes with its network's allocation
		}
		if o == nil {
			add("", "pool %s is taken, but no network of Docker has it", p.Prefix)
			continue
		}
		leased := map[netip.Addr]bool{}
		for _, l := range p.Leases {
			if !l.Freed.IsZero() {
				continue
			}
			leased[l.Address] = true
			if l.Kind == "gateway" || o.used[l.Address] != "" {
				continue
			}
			remedy := ""
			switch {
			case p.Space != ipam.GlobalSpace || !swarm.active:
			case l.Doubt.IsZero():
				remedy = "; restart dockerd here to have it back"
			default: // from before this host became the leader, see package ipam
				remedy = "; it is freed if that stays so for ten minutes"
			}
			add(o.net, "address %s is leased (%s, since %s), but nothing in Docker has it%s", l.Address, l.Kind, clock(l.Taken), remedy)
		}
		for a, who := range o.used {
			if !leased[a] {
				add(o.net, "address %s (%s) is not leased", a, who)
			}
		}
	}
	sortDifferences(out)
	return out
}

func sortDifferences(all []difference) {
	slices.SortFunc(all, func(a, b difference) int {
		return cmp.Or(cmp.Compare(a.VNI, b.VNI), cmp.Compare(a.Network, b.Network), cmp.Compare(a.Text, b.Text))
	})
}
