package main

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/store"
)

const (
	scopeLocal  = "local"
	scopeGlobal = "global"
	// mostNamed is how many hosts or services are named before "and N more".
	mostNamed = 10
)

// problems says what is wrong between Docker's Swarm and the plugin.
func (v swarmView) problems() []problem {
	out := v.membership()
	for _, n := range v.networks {
		if p, wrong := v.network(n); wrong {
			out = append(out, p)
		}
	}
	return slices.Concat(out, v.unallocated(), v.hosts(), v.differences(), v.virtual(), v.oneForSeveral(), v.unlent())
}

// setScope is what to type for another scope.
func (v swarmView) setScope(scope string) string {
	return fmt.Sprintf("docker plugin disable -f %s && docker plugin set %[1]s WEFT_SCOPE=%s && docker plugin enable %[1]s", v.plugin, scope)
}

// membership compares the scope with what Docker is a part of.
func (v swarmView) membership() (out []problem) {
	if v.missing != "" {
		out = append(out, problem{Advice: true, Text: v.missing + ": whether Swarm and Weft fit was not looked at", Remedy: "look whether dockerd runs, and into its log"})
	}
	in := v.info.Swarm
	switch {
	case in.LocalNodeState == "locked":
		out = append(out, problem{Text: "Docker's Swarm is locked: managers do not work", Remedy: "docker swarm unlock"})
	case in.LocalNodeState == "error", in.LocalNodeState == "pending":
		out = append(out, problem{Text: strings.TrimSuffix(fmt.Sprintf("Docker's Swarm is in state %s: %s", in.LocalNodeState, in.Error), ": "), Remedy: "docker info, and dockerd's log"})
	case in.LocalNodeState == "inactive" && v.status.Scope == scopeGlobal:
		p := problem{Advice: true, Text: "scope is global, but Docker is in no Swarm: networks are this host's only", Remedy: "docker swarm init or join; or on this host: " + v.setScope(scopeLocal)}
		if v.refusesGlobal() {
			p.Advice, p.Text = false, fmt.Sprintf("scope is global, but Docker is in no Swarm: engines as old as this one (%s) refuse to create networks then", v.info.ServerVersion)
		}
		out = append(out, p)
	case in.LocalNodeState == "active" && v.status.Scope == scopeLocal && len(v.networks) == 0:
		out = append(out, problem{Advice: true, Text: fmt.Sprintf("scope is local in a Swarm: docker network create -d %s makes networks of this host only, which services cannot use", v.plugin),
			Remedy: "for networks of the whole Swarm, on every host: " + v.setScope(scopeGlobal) + "; or keep it and use --config-from (README, Swarm)"})
	}
	return out
}

// refusesGlobal reports whether the engine refuses networks of scope global outside
// a Swarm: 20.10 does, 28 does not; those between count as old. What is built from
// source has no number and is new.
func (v swarmView) refusesGlobal() bool {
	major, _, _ := strings.Cut(v.info.ServerVersion, ".")
	n, err := strconv.Atoi(major)
	return err == nil && n >= 17 && n < 28
}

// network says what is wrong with a network of scope swarm.
func (v swarmView) network(n dockerNetwork) (problem, bool) {
	_, allocated := n.Options[driver.OptKey]
	from := n.ConfigFrom.Network
	switch {
	case v.status.Scope == scopeGlobal && from != "":
		return problem{Text: fmt.Sprintf("network %s takes its configuration from %s, which cannot be under scope global: its tasks are rejected", n.Name, from),
			Remedy: fmt.Sprintf("create it without --config-from; or on every host: %s, and restart dockerd on the managers", v.setScope(scopeLocal))}, true
	case v.status.Scope == scopeGlobal && !allocated && v.info.Swarm.ControlAvailable:
		return problem{Text: fmt.Sprintf("network %s waits for Weft on the Swarm's leader, %s", n.Name, orDash(v.nodeName(v.leader()))),
			Remedy: "enable the plugin there with WEFT_SCOPE=global; Docker asks it again"}, true
	case v.status.Scope == scopeLocal && allocated && from != "":
		return problem{Text: fmt.Sprintf("the Swarm's leader keeps to scope global from before: network %s has --config-from, but was given to Weft, and its tasks are rejected", n.Name),
			Remedy: "restart dockerd on the managers, one after the other; then create the network and its services again"}, true
	case v.status.Scope == scopeLocal && allocated:
		return problem{Text: fmt.Sprintf("network %s was created under scope global, but scope is local now", n.Name),
			Remedy: fmt.Sprintf("on every host: %s; or remove it and create it with --config-from", v.setScope(scopeGlobal))}, true
	case v.status.Scope == scopeLocal && from == "":
		return problem{Text: fmt.Sprintf("network %s was created with --scope swarm, but without --config-from: under scope local its subnet and options get lost, and hosts give out the same addresses", n.Name),
			Remedy: "remove it and create it with --config-from (README, Swarm), or under WEFT_SCOPE=global"}, true
	}
	return problem{}, false
}

// unallocated names the networks that the Swarm's leader has not allocated. On the
// leader the plugin itself says what it has refused.
func (v swarmView) unallocated() (out []problem) {
	if !v.info.Swarm.ControlAvailable || v.status.Scope != scopeGlobal {
		return nil
	}
	for _, n := range v.waiting {
		if slices.ContainsFunc(v.status.Problems, func(p problem) bool { return p.Network == store.NetworkID(n.ID) }) {
			continue
		}
		out = append(out, problem{Advice: true, Text: fmt.Sprintf("network %s is not allocated by the Swarm's leader, %s", n.Name, orDash(v.nodeName(v.leader()))),
			Remedy: "if it is Weft's, weft status there says why; the plugin must be enabled there with WEFT_SCOPE=global"})
	}
	return out
}

func (v swarmView) nodeName(id string) string {
	for _, n := range v.nodes {
		if n.ID == id {
			return n.Description.Hostname
		}
	}
	return ""
}

// hosts names the Swarm's hosts without the plugin, as a manager sees them.
func (v swarmView) hosts() (out []problem) {
	if v.status.Scope != scopeGlobal && len(v.networks) == 0 {
		return nil // networks of single hosts need no others
	}
	var without, off, unheard []string
	for _, n := range v.nodes {
		if n.Status.State != "ready" || n.ID == v.info.Swarm.NodeID {
			continue
		}
		// A plugin that was enabled since dockerd's start stays a Network plugin
		// when it is disabled or removed; its ipamdriver goes.
		var network, ipam bool
		for _, p := range n.Description.Engine.Plugins {
			network = network || p.Name == v.plugin && p.Type == "Network"
			ipam = ipam || p.Name == v.plugin && p.Type == "ipamdriver"
		}
		switch {
		case ipam:
			if !v.heard(n) {
				unheard = append(unheard, fmt.Sprintf("%s (%s)", n.Description.Hostname, n.Status.Addr))
			}
		case network:
			off = append(off, n.Description.Hostname)
		default:
			without = append(without, n.Description.Hostname)
		}
	}
	if len(without) > 0 {
		out = append(out, problem{Text: fmt.Sprintf("hosts of the Swarm without the plugin %s: %s; they get no tasks on its networks", v.plugin, some(without)),
			Remedy: "create and enable it there under the same name"})
	}
	if len(off) > 0 {
		out = append(out, problem{Text: fmt.Sprintf("hosts of the Swarm where the plugin %s was disabled or removed: %s; they still get tasks on its networks, which do not start", v.plugin, some(off)),
			Remedy: "docker plugin enable " + v.plugin + " there; or docker node update --availability drain"})
	}
	// When nobody is heard, the plugin says so itself.
	if len(unheard) > 0 && len(v.peers) > 0 {
		out = append(out, problem{Text: "hosts of the Swarm that have the plugin, but were never heard: " + some(unheard),
			Remedy: "set the same WEFT_PORT, WEFT_DATA_PORT and WEFT_KEY on all hosts, and open the ports between them"})
	}
	return out
}

func (v swarmView) heard(n dockerNode) bool {
	addr, _ := netip.ParseAddr(n.Status.Addr)
	return slices.ContainsFunc(v.peers, func(p peerReply) bool { return p.Name == n.Description.Hostname || p.Address == addr })
}

// differences names the peers with other settings than this host, in a Swarm or
// not.
func (v swarmView) differences() (out []problem) {
	var versions, ports, scopes []string
	self := v.status.Host
	for _, p := range v.peers {
		if !p.Alive {
			continue
		}
		if p.Version != self.Version {
			versions = append(versions, p.Name+" has "+orDash(p.Version))
		}
		// Hosts behind one NAT need different ones, and what is encrypted or routed plainly
		// between them does not use it.
		if p.DataPort != self.DataPort && p.VXLAN {
			ports = append(ports, fmt.Sprintf("%s has %d", p.Name, p.DataPort))
		}
		if p.Scope != "" && p.Scope != v.status.Scope && v.info.Swarm.LocalNodeState == "active" {
			scopes = append(scopes, p.Name+" has "+p.Scope)
		}
	}
	if len(ports) > 0 {
		out = append(out, problem{Text: fmt.Sprintf("WEFT_DATA_PORT differs: %s, this host %d; no VXLAN passes between them", some(ports), self.DataPort), Remedy: "set the same on all hosts; behind one NAT, where each needs its own, share encrypted networks"})
	}
	if len(scopes) > 0 {
		out = append(out, problem{Text: fmt.Sprintf("WEFT_SCOPE differs: %s, this host %s", some(scopes), v.status.Scope), Remedy: "set the same on all hosts: " + v.setScope(v.status.Scope)})
	}
	if len(versions) > 0 {
		out = append(out, problem{Advice: true, Text: fmt.Sprintf("the plugin's version differs: %s, this host %s", some(versions), orDash(self.Version)), Remedy: "docker plugin upgrade, one host after the other"})
	}
	return out
}

// virtual names the services whose virtual address nobody answers: Docker makes its
// load balancer for its own overlay networks alone, and Weft does where the leader's
// plugin may ask Docker.
func (v swarmView) virtual() (out []problem) {
	names := map[string]string{}
	for _, n := range v.networks {
		names[n.ID] = n.Name
	}
	more := 0
	for _, s := range v.services {
		var where []string
		for _, ip := range s.Endpoint.VirtualIPs {
			// With --config-from Docker gives none: the name resolves to the tasks.
			addr, err := netip.ParseAddr(withoutBits(ip.Addr))
			if name, ours := names[ip.NetworkID]; ours && err == nil && !(v.status.Program == "on" && slices.Contains(v.status.Answered, addr)) {
				where = append(where, fmt.Sprintf("%s on network %s", withoutBits(ip.Addr), name))
			}
		}
		switch {
		case len(where) == 0:
		case len(out) == mostNamed:
			more++
		default:
			out = append(out, s.virtual(strings.Join(where, ", ")))
		}
	}
	if more > 0 {
		out = append(out, problem{Text: fmt.Sprintf("%d more services have a virtual address that nobody answers", more)})
	}
	return out
}

// unlent tells of a manager whose plugin may not ask Docker. While it leads, nobody tells
// the hosts of services; what an earlier leader has told stands, and grows old.
func (v swarmView) unlent() []problem {
	allocated := slices.ContainsFunc(v.networks, func(n dockerNetwork) bool { return n.Options[driver.OptKey] != "" })
	if v.status.Lent || v.status.Scope != scopeGlobal || !v.info.Swarm.ControlAvailable || !allocated {
		return nil
	}
	p := problem{Advice: true, Text: "this manager's plugin may not ask Docker: while this host leads the Swarm, nobody answers virtual addresses of new services, and the log does not name them",
		Remedy: fmt.Sprintf("docker plugin disable -f %s && docker plugin set %[1]s docker.source=/var/run/docker.sock && docker plugin enable %[1]s (who can use that socket is root on the host); or use dnsrr for all services", v.plugin)}
	if v.leader() == v.info.Swarm.NodeID && len(v.status.Answered) > 0 {
		p.Advice, p.Text = false, "this host leads the Swarm, but its plugin may not ask Docker: hosts answer virtual addresses of services by what an earlier leader told them, and learn of no new task"
	}
	return []problem{p}
}

// virtual says what to type so that a service's name resolves to its tasks. Docker
// refuses that mode with ports that are published on every host.
func (s dockerService) virtual(where string) problem {
	ports := ""
	for _, p := range s.Spec.EndpointSpec.Ports {
		if p.PublishMode == "host" {
			continue
		}
		published, old := "", strconv.Itoa(p.TargetPort)
		if p.PublishedPort != 0 {
			published, old = fmt.Sprintf(",published=%d", p.PublishedPort), fmt.Sprintf("%d:%d", p.PublishedPort, p.TargetPort)
		}
		ports += fmt.Sprintf(" --publish-rm %s/%s --publish-add mode=host,target=%d%s,protocol=%[2]s", old, p.Protocol, p.TargetPort, published)
	}
	out := problem{
		Text:   fmt.Sprintf("service %s: nobody answers its virtual address, %s; tasks.%[1]s resolves to its tasks, and with the mode dnsrr its name does; or let the plugins of managers ask Docker (docker.source, README), and hosts answer it", s.Spec.Name, where),
		Remedy: fmt.Sprintf("docker service update --endpoint-mode dnsrr%s %s", ports, s.Spec.Name),
	}
	inFile := "endpoint_mode: dnsrr under deploy"
	if ports != "" {
		out.Text += "; its published ports are then open only on hosts with a task"
		inFile += ", and mode: host under ports,"
	}
	if s.Spec.Labels["com.docker.stack.namespace"] != "" {
		out.Remedy = fmt.Sprintf("%s in the stack's file; or: %s", inFile, out.Remedy)
	}
	return out
}

// oneForSeveral names the services that share a virtual address. Docker frees it when the
// first of them gives it up, so all have to.
func (v swarmView) oneForSeveral() (out []problem) {
	for _, n := range v.networks {
		have := map[string][]dockerService{}
		for _, s := range slices.SortedFunc(slices.Values(v.services), older) {
			for _, ip := range s.Endpoint.VirtualIPs {
				if ip.NetworkID == n.ID && ip.Addr != "" {
					have[ip.Addr] = append(have[ip.Addr], s)
				}
			}
		}
		for _, addr := range slices.Sorted(maps.Keys(have)) {
			all := have[addr]
			if len(all) < 2 || len(out) == mostNamed {
				continue
			}
			var names, updates []string
			remedy := ""
			for _, s := range all {
				names = append(names, s.Spec.Name)
				updates = append(updates, "docker service update --endpoint-mode dnsrr "+s.Spec.Name)
				if slices.ContainsFunc(s.Spec.EndpointSpec.Ports, func(p dockerPort) bool { return p.PublishMode != "host" }) {
					remedy = "remove them all and create them again"
				}
			}
			out = append(out, problem{Text: fmt.Sprintf("services %s have one virtual address, %s on network %s: it leads to %s alone, the oldest; tasks.NAME resolves to the tasks of each", some(names), withoutBits(addr), n.Name, all[0].Spec.Name),
				Remedy: cmp.Or(remedy, strings.Join(updates[:min(len(updates), mostNamed)], " && ")+"; and back with --endpoint-mode vip")})
		}
	}
	return out
}

// some joins the first names.
func some(names []string) string {
	if len(names) > mostNamed {
		names = append(slices.Clone(names[:mostNamed]), fmt.Sprintf("and %d more", len(names)-mostNamed))
	}
	return strings.Join(names, ", ")
}
