package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/store"
)

// status gathers what the process knows of itself.
func (p *process) status() (statusReply, error) {
	svc, stage, fault := p.gate.peek()
	s := statusReply{Version: buildVersion(), Started: p.started, Ready: svc != nil, Stage: stage,
		Scope: p.set.scope, Join: append([]string{}, p.set.join...), Encrypted: len(p.set.key) > 0, Problems: []problem{}}
	if fault != nil {
		s.Error = fault.Error()
	}
	if svc == nil {
		s.Problems = append(s.Problems, unreadyProblem(stage, fault))
		return s, nil
	}
	s.Host, s.IPTables, s.Rebuilt = svc.db.Self(), svc.kernel.Backend(), svc.rebuilt
	s.Program, s.Lent, s.UserRules = programState(p.program), lent(), svc.kernel.UserRules()
	u := svc.loop.Underlay()
	s.Underlay = underlayReply{Address: u.Address, Link: u.Link, MTU: u.MTU}
	if u.NoChecksum {
		s.Underlay.NoChecksum = u.Reason
	}
	stats := svc.loop.Stats()
	s.Loop = loopReply{Passes: stats.Passes, Ops: stats.Ops, Failures: stats.Failures, Repaired: stats.Repaired}
	var err error
	if s.Records, err = countRecords(svc.db); err != nil {
		return s, err
	}
	if err := svc.db.View(func(tx *store.Tx) (err error) { s.Answered, err = answered(tx); return err }); err != nil {
		return s, err
	}
	if s.Swarm, err = svc.swarm(); err != nil {
		return s, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), adminLimit)
	defer cancel()
	crypt, err := svc.encryption(ctx)
	if err != nil {
		return s, err
	}
	s.Tunnels = crypt.Devices
	nets, err := svc.networks()
	if err != nil {
		return s, err
	}
	peers, err := svc.peers(crypt)
	if err != nil {
		return s, err
	}
	routes, err := svc.kernel.Routes(ctx)
	if err != nil {
		return s, err
	}
	firewalld, err := svc.kernel.Firewalld(ctx)
	if err != nil {
		return s, err
	}
	_, clusterErr := svc.cluster.get()
	heard := svc.cluster.stats()
	if clusterErr == nil && heard.Err != "" && heard.Twin == "" {
		clusterErr = errors.New(heard.Err)
	}
	s.Problems = append(s.Problems, problems(view{
		status: s, networks: nets, routes: routes, encryption: crypt, peers: peers, passes: svc.loop.Status(), clusterErr: clusterErr, twin: heard.Twin, otherKey: heard.Dropped["other-key"], refused: svc.driver.Refusals(),
		noUnderlay: u.Reason, addressSet: p.set.address.IsValid(), noForward: notForwarding(cmp.Or(p.sysnet(), "/proc/sys/net")), xtablesShared: !isDevice(xtablesLock), firewalld: firewalld,
	})...)
	return s, nil
}

// programState says whether the port program is on, or why not.
func programState(p *kernel.Program) string {
	if err := p.Err(); err != nil {
		return "off: " + err.Error()
	}
	return "on"
}

// notForwarding returns the settings that would let this host forward IPv4, if it does
// not. Of IPv6 the data plane takes care.
func notForwarding(sysnet string) []string {
	text, err := os.ReadFile(filepath.Join(sysnet, "ipv4/ip_forward"))
	if err != nil || strings.TrimSpace(string(text)) != "0" {
		return nil
	}
	return []string{"net.ipv4.ip_forward=1"}
}

const xtablesLock = "/run/xtables.lock"

// isDevice reports whether path is a character device: config.json mounts
// /dev/null as the lock unless the host's lock is shared.
func isDevice(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}

// view is what problems are found in.
type view struct {
	status        statusReply
	networks      []networkReply
	routes        []kernel.Route
	encryption    encryptionReply
	peers         []peerReply
	passes        []dataplane.NetworkStatus
	clusterErr    error
	twin          string // address of another process with this host's identity
	otherKey      uint64 // messages that this host's cluster key does not open
	refused       map[store.NetworkID]driver.Refusal
	noUnderlay    string   // why
	noForward     []string // settings by which this host does not forward
	firewalld     kernel.Firewalld
	addressSet    bool // WEFT_ADDRESS
	xtablesShared bool
}

// unreadyProblem says why no call is served, at which stage of the start.
func unreadyProblem(stage string, fault error) problem {
	if fault == nil {
		return problem{Text: "weft is still " + stage, Remedy: "wait a moment; if it stays so, look into the log of dockerd"}
	}
	remedy := "running containers keep their networks; it is tried again every few seconds"
	if _, wrong := errors.AsType[wrongSettings](fault); wrong {
		remedy = "running containers keep their networks; settings, and the files that they name, are read when the plugin starts"
	}
	return problem{Text: "every call of Docker is refused: " + fault.Error(), Remedy: remedy}
}

// problems says in words what is wrong, the worst first.
func problems(v view) []problem {
	var out []problem
	add := func(remedy, format string, args ...any) {
		out = append(out, problem{Text: fmt.Sprintf(format, args...), Remedy: remedy})
	}
	if v.status.Rebuilt != "" {
		add("check weft audit; the damaged file may be removed when all is well", "%s", v.status.Rebuilt)
	}
	if !v.status.Underlay.Address.IsValid() {
		remedy := "add a default route, or set WEFT_ADDRESS"
		if v.addressSet {
			remedy = "set WEFT_ADDRESS to an address of this host, or clear it"
		}
		add(remedy, "no underlay, so this host's networks do not reach other hosts: %s", cmp.Or(v.noUnderlay, "it was not looked for yet"))
	}
	for _, p := range v.passes {
		if p.Err == "" {
			continue
		}
		what := "the host's rules do"
		if p.VNI != store.HostVNI {
			what = fmt.Sprintf("network %d does", p.VNI)
		}
		add("it is tried again; weft plan shows the difference", "%s not match the records since %s: %s", what, clock(p.Since), firstLines(p.Err, 3))
	}
	for _, p := range v.passes {
		where := "the host's rules"
		if p.VNI != store.HostVNI {
			where = fmt.Sprintf("network %d", p.VNI)
		}
		if p.Held != "" {
			add("", "%s: deletions wait: %s", where, p.Held)
		}
		if n := p.Full["service"]; n > 0 {
			add("docker service update --endpoint-mode dnsrr for services that can do without", "%s: nobody answers %d virtual addresses here: the port program has room for 4,096 on all networks of a host", where, n)
		}
		if n := p.Full["dest"]; n > 0 {
			out = append(out, problem{Advice: true, Text: fmt.Sprintf("%s: %d addresses of endpoints are reached through the host's stack, which is slower: the port program has room for 262,144 on all networks of a host", where, n),
				Remedy: "create networks that can do without with -o fastpath=false"})
		}
	}
	for _, n := range v.networks {
		for _, d := range n.Disagree {
			add("give both the same subnets, or one of them another vni", "network %d has subnets %v here, but others on host %s: they are not connected", n.VNI, n.Prefixes(), d)
		}
	}
	for _, n := range v.networks {
		for _, r := range v.routes {
			if !slices.ContainsFunc(n.Prefixes(), r.Prefix.Overlaps) {
				continue
			}
			who := "containers"
			if n.Routed() {
				who = "containers and this host"
			}
			add("remove the route, or the network and create it again with another --subnet", "network %d has subnets %v, over which this host has the route %s on %s: %s do not reach what is behind it", n.VNI, n.Prefixes(), r.Prefix, cmp.Or(r.Link, "no link"), who)
		}
	}
	if i := slices.IndexFunc(v.networks, func(n networkReply) bool { return n.Routed() || n.OwnGateway() }); i >= 0 && len(v.noForward) > 0 {
		add("sysctl -w "+strings.Join(v.noForward, " ")+", and the same in /etc/sysctl.d; dockerd does it itself unless it runs with --ip-forward=false", "this host does not forward packets, which network %d needs that is routed, encrypted or has gateway=weft", v.networks[i].VNI)
	}
	if v.firewalld.Zones && len(v.networks) > 0 {
		add("firewall-cmd --permanent --new-zone=weft, and what follows it in the README, Firewalls", "firewalld rejects what containers send each other and out: the links weft+ are in none of its zones")
	}
	bridged := func(n networkReply) bool {
		return !n.Routed() && !n.OwnGateway() && slices.ContainsFunc(n.Prefixes(), func(p netip.Prefix) bool { return p.Addr().Is6() })
	}
	if i := slices.IndexFunc(v.networks, bridged); i >= 0 && v.firewalld.ReversePath {
		add("IPv6_rpfilter=no in /etc/firewalld/firewalld.conf and firewall-cmd --reload, or -o gateway=weft", "firewalld drops the IPv6 of network %d, because this host has no route back to its containers", v.networks[i].VNI)
	}
	for _, n := range v.networks {
		if len(n.Twice) > 0 {
			named := slices.Clone(n.Twice[:min(len(n.Twice), mostNamed)])
			if more := max(len(n.Twice), n.Status.Contested) - len(named); more > 0 {
				named = append(named, fmt.Sprintf("and %d more", more))
			}
			add("remove one of the two containers and start it again; give each host its own --ip-range, or use --ipam-driver weft:latest; a host that draws to itself what is not its own: weft encryption revoke HOST",
				"network %d: addresses that two have, so one gets no packets: %s", n.VNI, strings.Join(named, ", "))
		}
	}
	for _, n := range v.networks {
		if len(n.Crowded) > 0 {
			add("make several services of it, or docker service update --endpoint-mode dnsrr", "network %d: a virtual address leads to %d tasks at most, those with the lowest addresses; the others get nothing: %s", n.VNI, dataplane.MaxBackends, strings.Join(n.Crowded, ", "))
		}
	}
	for _, n := range v.networks {
		if len(n.Alike) > 0 && len(n.Peers) == 0 {
			out = append(out, problem{Advice: true, Text: fmt.Sprintf("network %d has the same subnets as %s: they are not connected", n.VNI, strings.Join(n.Alike, ", ")),
				Remedy: "if they are meant to be one, remove one of them and create it again with the other's number: -o vni=NUMBER"})
		}
	}
	for _, n := range v.networks {
		if len(n.Services) > 0 && n.Endpoints > 0 && (v.status.Program != "on" || n.SlowPath) {
			why := "the port program is " + v.status.Program
			if n.SlowPath {
				why = "the network has fastpath=false"
			}
			add("docker service update --endpoint-mode dnsrr for each of them; tasks.NAME resolves to the tasks as it is", "network %d: this host's containers get no answer from virtual addresses of services (%s): %s", n.VNI, some(n.Services), why)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(v.refused)) {
		text, remedy := "Swarm network %.12s is not allocated, and its tasks wait: %s", "remove the network and create it again without what is wrong"
		if v.refused[id].Here {
			text, remedy = "Swarm network %.12s is not on this host, and its tasks do not start here: %s", "put right what is in the way, and Docker's next try succeeds; or docker node update --availability drain"
		}
		add(remedy, text, id, v.refused[id].Reason)
		out[len(out)-1].Network = id
	}
	out = append(out, v.clusterProblems()...)
	out = append(out, v.encryptionProblems()...)
	if v.status.Program != "on" && v.status.Program != "off: "+switchedOff {
		out = append(out, problem{Advice: true, Text: "containers are not guarded, and reach each other through bridge and rules alone: the port program is " + v.status.Program,
			Remedy: "use Linux 5.15 or newer, and let the plugin have CAP_BPF and CAP_PERFMON; or say that it is meant: docker plugin set weft:latest WEFT_PROGRAM=off"})
	}
	if past := slices.IndexFunc(v.networks, func(n networkReply) bool { return !n.SlowPath }); past >= 0 && v.status.Program == "on" && v.status.UserRules > 0 {
		out = append(out, problem{Advice: true, Text: fmt.Sprintf("%d rules in DOCKER-USER do not see what containers of one Weft network send each other: it goes past iptables", v.status.UserRules),
			Remedy: "if they should, create the networks with -o fastpath=false"})
	}
	if v.status.IPTables == "legacy" && !v.xtablesShared {
		add("echo 'f /run/xtables.lock 0600' > /etc/tmpfiles.d/xtables.conf && systemd-tmpfiles --create && docker plugin disable -f weft:latest && docker plugin set weft:latest xtables.source=/run/xtables.lock && docker plugin enable weft:latest",
			"iptables is legacy, and its lock is not shared with the host: rules that Docker and Weft write at the same moment can get lost")
	}
	return out
}

func (v view) clusterProblems() (out []problem) {
	add := func(remedy, format string, args ...any) {
		out = append(out, problem{Text: fmt.Sprintf(format, args...), Remedy: remedy})
	}
	if v.clusterErr != nil {
		add("it is tried again every few seconds", "other hosts are not heard: %v", v.clusterErr)
	}
	if v.twin != "" {
		add("on the copy remove host.key from the plugin's state folder, and weft.db unless Docker's own folder was copied with it, and enable the plugin again", "host %s has the same identity as this one (a copied state folder or cloned machine): their records overwrite each other", v.twin)
	}
	var silent []string
	for _, p := range v.peers {
		if !p.Alive {
			text := fmt.Sprintf("%s (%s) since %s", p.Name, p.Address, clock(p.DeadSince))
			if p.DeadSince.IsZero() {
				text = fmt.Sprintf("%s (%s), not heard since this plugin started", p.Name, p.Address)
			}
			if p.Hidden {
				text += ", its endpoints are hidden"
			}
			silent = append(silent, text)
		} else if p.Cut {
			add("open the gossip port (TCP and UDP), the data port (TCP) and for encrypted networks those of WireGuard (UDP) between the two hosts; until then their containers do not reach each other", "host %s (%s) is alive, as others tell, but this host does not reach it: %s", p.Name, p.Via, p.LastErr)
		} else if p.LastErr != "" {
			add("open the data port (TCP) between the hosts; compare WEFT_KEY", "records of host %s (%s) cannot be fetched: %s", p.Name, p.Address, p.LastErr)
		}
	}
	if len(silent) > 0 {
		add("look whether the hosts, their plugins and the gossip port (TCP and UDP) are reachable", "silent hosts: %s", strings.Join(silent, "; "))
	}
	if v.otherKey > 0 && (len(silent) > 0 || len(v.peers) == 0) {
		add("set the same WEFT_KEY_FILE or WEFT_KEY on all hosts", "messages under another cluster key, or none, are refused: %d since this plugin started", v.otherKey)
	}
	if len(v.status.Join) > 0 && v.clusterErr == nil && len(v.peers) == 0 {
		add("look whether the gossip port (TCP and UDP) is open between the hosts, and whether all have the same WEFT_KEY", "no other host was ever heard (WEFT_JOIN=%s)", strings.Join(v.status.Join, ","))
	}
	if len(v.status.Swarm.Discovered) > 0 && v.clusterErr == nil && len(v.peers) == 0 {
		add("enable the plugin on all hosts of the Swarm, with the same ports and WEFT_KEY; open the gossip port (TCP and UDP) between them", "no other host of the Swarm was ever heard (%v)", v.status.Swarm.Discovered)
	}
	if (len(v.status.Join) > 0 || v.status.Swarm.Self.IsValid()) && !v.status.Encrypted {
		out = append(out, problem{Advice: true, Text: "what hosts tell each other is neither encrypted nor closed to strangers: no key is set",
			Remedy: "set the same WEFT_KEY_FILE or WEFT_KEY on all hosts"})
	}
	return out
}

// unansweredFor is how long a living peer may not answer on its tunnel before that is a
// problem: a handshake is tried every five seconds.
const unansweredFor = 20 * time.Second

func (v view) encryptionProblems() (out []problem) {
	alive := map[store.HostID]bool{}
	for _, p := range v.peers {
		alive[p.ID] = p.Alive
	}
	port := uint16(0)
	for _, d := range v.encryption.Devices {
		if port == 0 {
			port = d.Port
		}
		if !d.Module {
			out = append(out, problem{Advice: true, Text: d.Name + ": Weft encrypts itself, which is slower than the kernel's WireGuard and pauses for a moment when the plugin is replaced",
				Remedy: "modprobe wireguard && echo wireguard > /etc/modules-load.d/wireguard.conf; it is used from the plugin's next start"})
		}
	}
	out = append(out, v.keyProblems()...)
	for _, r := range v.encryption.Revoked {
		if r.Self {
			out = append(out, problem{Text: "this host is revoked: the others drop it", Remedy: "if that is wrong, on another host: weft encryption restore " + string(r.ID)})
		} else {
			out = append(out, problem{Advice: true, Text: fmt.Sprintf("host %s (%s) is revoked", orDash(r.Name), r.ID), Remedy: "weft encryption restore takes it back"})
		}
	}
	for _, p := range v.encryption.Peers {
		if p.State != "on" && p.KeyOf == "" && alive[p.ID] && time.Since(v.status.Started) > unansweredFor {
			out = append(out, problem{Text: fmt.Sprintf("nothing of the encrypted networks reaches host %s: it %s", p.Host, p.State),
				Remedy: fmt.Sprintf("open UDP ports %d and %d between the hosts; compare weft encryption on both", port, port+1)})
		}
	}
	return out
}

// keyProblems tells of peers that tell the WireGuard key of another host.
func (v view) keyProblems() (out []problem) {
	names := map[store.HostID]string{}
	for _, p := range v.peers {
		names[p.ID] = p.Name
	}
	for _, p := range v.peers {
		revoked := slices.ContainsFunc(v.encryption.Revoked, func(r revokedReply) bool { return r.ID == p.ID })
		if p.KeyOf == "" || revoked {
			continue
		}
		out = append(out, problem{Text: fmt.Sprintf("host %s (%s) tells the WireGuard key of %s (%s) as its own: nothing is encrypted to it or taken from it", p.Name, p.ID, keyOwner(p.KeyOf, v.status.Host.ID, names), p.KeyOf),
			Remedy: "if one of the two was made from a copy of the other: weft encryption rotate on the copy, which gives it a key of its own within a minute; if you know of no copy, the host draws to itself what is not its own: weft encryption revoke " + string(p.ID)})
	}
	return out
}

func clock(t time.Time) string {
	if t.IsZero() {
		return "an unknown time"
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

func firstLines(s string, n int) string {
	all := strings.Split(s, "\n")
	if len(all) > n {
		all = append(all[:n], fmt.Sprintf("and %d more", len(all)-n))
	}
	return strings.Join(all, "; ")
}
