package main

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/store"
)

func TestProblemsAreSaidInWords(t *testing.T) {
	at := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	well := func() view {
		return view{xtablesShared: true, status: statusReply{Encrypted: true, IPTables: "nft", Program: "on", Underlay: underlayReply{Address: netip.MustParseAddr("192.0.2.1")}}}
	}
	peer := func(change func(*peerReply)) []peerReply {
		p := peerReply{Alive: true, Peer: store.Peer{Host: store.Host{Name: "beta", Address: netip.MustParseAddr("192.0.2.2")}}}
		change(&p)
		return []peerReply{p}
	}
	if got := problems(well()); len(got) != 0 {
		t.Errorf("nothing is wrong, but: %v", got)
	}
	for _, c := range []struct {
		name   string
		change func(*view)
		want   string
		advice bool
	}{
		{"rebuilt", func(v *view) { v.status.Rebuilt = "the database was damaged" }, "the database was damaged", false},
		{"no underlay", func(v *view) { v.status.Underlay, v.noUnderlay = underlayReply{}, "there is no default route" }, "there is no default route", false},
		{"wrong address", func(v *view) {
			v.status.Underlay, v.noUnderlay, v.addressSet = underlayReply{}, "this host has no address 192.0.2.9", true
		}, "set WEFT_ADDRESS to an address of this host", false},
		{"no forwarding", func(v *view) {
			v.networks, v.noForward = []networkReply{{Network: store.Network{VNI: 4096, Mode: store.ModeRouted}}}, []string{"net.ipv4.ip_forward=1"}
		}, "sysctl -w net.ipv4.ip_forward=1", false},
		{"firewalld", func(v *view) {
			v.networks, v.firewalld.Zones = []networkReply{{Network: store.Network{VNI: 4096}}}, true
		}, "the links weft+ are in none of its zones", false},
		{"firewalld and IPv6", func(v *view) {
			v.firewalld.ReversePath = true
			v.networks = []networkReply{
				{Network: store.Network{VNI: 4096, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.9.0.0/16")}}}},
				{Network: store.Network{VNI: 4097, GatewayWeft: true, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("fd01::/64")}}}},
				{Network: store.Network{VNI: 4098, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("fd02::/64")}}}},
			}
		}, "firewalld drops the IPv6 of network 4098", false},
		{"userspace", func(v *view) { v.encryption.Devices = []tunnelReply{{Name: "weftw0", Port: 4798}} }, "modprobe wireguard", true},
		{"silent tunnel", func(v *view) {
			v.peers = peer(func(p *peerReply) { p.ID = "b" })
			v.encryption.Devices = []tunnelReply{{Name: "weftw0", Module: true, Port: 4798}}
			v.encryption.Peers = []tunnelPeerReply{{Host: "beta", ID: "b", State: "waits for its answer"}}
		}, "nothing of the encrypted networks reaches host beta: it waits for its answer", false},
		{"key of another host", func(v *view) {
			v.peers = append(peer(func(p *peerReply) { p.ID, p.KeyOf = "b", "c" }), peerReply{Alive: true, Peer: store.Peer{Host: store.Host{ID: "c", Name: "gamma"}}})
			v.encryption.Peers = []tunnelPeerReply{{Host: "beta", ID: "b", KeyOf: "c", State: "refused"}}
		}, "host beta (b) tells the WireGuard key of host gamma (c) as its own: nothing is encrypted to it or taken from it", false},
		{"key of this host", func(v *view) {
			v.status.Host.ID, v.peers = "c", peer(func(p *peerReply) { p.ID, p.KeyOf = "b", "c" })
		}, "host beta (b) tells the WireGuard key of this host (c) as its own: nothing is encrypted to it or taken from it → if one of the two was made from a copy of the other: weft encryption rotate on the copy, which gives it a key of its own within a minute; if you know of no copy, the host draws to itself what is not its own: weft encryption revoke b", false},
		{"key of another host, which revoked hosts may tell", func(v *view) {
			v.peers = peer(func(p *peerReply) { p.ID, p.KeyOf = "b", "c" })
			v.encryption.Revoked = []revokedReply{{ID: "b", Name: "beta"}}
		}, "host beta (b) is revoked", true},
		{"revoked", func(v *view) { v.encryption.Revoked = []revokedReply{{ID: "a", Self: true}} }, "this host is revoked", false},
		{"another revoked", func(v *view) { v.encryption.Revoked = []revokedReply{{ID: "b", Name: "beta"}} }, "host beta (b) is revoked", true},
		{"failing pass", func(v *view) {
			v.passes = []dataplane.NetworkStatus{{VNI: 4096, Err: "no space left on device", Since: at}}
		}, "network 4096 does not match the records since 2026-11-24 12:00:00 UTC: no space left on device", false},
		{"failing host", func(v *view) { v.passes = []dataplane.NetworkStatus{{Err: "a\nb\nc\nd", Since: at}} }, "the host's rules do not match the records since 2026-11-24 12:00:00 UTC: a; b; c; and 1 more", false},
		{"held", func(v *view) { v.passes = []dataplane.NetworkStatus{{VNI: 4096, Held: "12 of 14 peers are silent"}} }, "network 4096: deletions wait: 12 of 14", false},
		{"held on the host", func(v *view) { v.passes = []dataplane.NetworkStatus{{Held: "12 of 14 peers are silent"}} }, "the host's rules: deletions wait: 12 of 14", false},
		{"no room for services", func(v *view) {
			v.passes = []dataplane.NetworkStatus{{VNI: 4096, Full: map[string]int{"service": 3}}}
		}, "network 4096: nobody answers 3 virtual addresses here", false},
		{"no room for destinations", func(v *view) {
			v.passes = []dataplane.NetworkStatus{{VNI: 4096, Full: map[string]int{"dest": 5}}}
		}, "network 4096: 5 addresses of endpoints are reached through the host's stack", true},
		{"other subnets", func(v *view) {
			v.networks = []networkReply{{Network: store.Network{VNI: 4096}, Disagree: []string{"beta (vxlan [10.9.0.0/16])"}}}
		}, "others on host beta (vxlan [10.9.0.0/16]): they are not connected", false},
		{"route over a subnet", func(v *view) {
			v.networks = []networkReply{{Network: store.Network{VNI: 4096, Mode: store.ModeRouted, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.9.0.0/16")}}}}}
			v.routes = []kernel.Route{{Prefix: netip.MustParsePrefix("10.9.1.0/24"), Link: "tun0"}, {Prefix: netip.MustParsePrefix("10.8.0.0/24"), Link: "eth1"}}
		}, "has the route 10.9.1.0/24 on tun0: containers and this host do not reach", false},
		{"address twice", func(v *view) {
			v.networks = []networkReply{{Network: store.Network{VNI: 4096}, Twice: []string{"10.9.0.2 (endpoint a here, b on host beta)"}}}
		}, "network 4096: addresses that two have, so one gets no packets: 10.9.0.2 (endpoint a here, b on host beta)", false},
		{"many tasks", func(v *view) {
			v.networks = []networkReply{{Network: store.Network{VNI: 4096}, Crowded: []string{"web (10.9.0.2) has 600"}}}
		}, "network 4096: a virtual address leads to 512 tasks at most, those with the lowest addresses; the others get nothing: web (10.9.0.2) has 600", false},
		{"address on two other hosts", func(v *view) {
			beta, gamma := dataplane.Claimant{Host: "b1", Name: "beta", Endpoint: "b"}, dataplane.Claimant{Host: "c1", Name: "gamma", Endpoint: "c"}
			status := dataplane.NetworkStatus{Contested: 12, Contests: []dataplane.Contest{
				{What: "10.9.0.2", Used: dataplane.Claimant{Endpoint: "a", Here: true}, Other: beta}, {What: "10.9.0.3", Used: beta, Other: gamma}, {What: "fd00::3", Used: beta, Other: gamma, Open: true}}}
			v.networks = []networkReply{{Network: store.Network{VNI: 4096}, Status: status, Twice: twice(status)}}
		}, "10.9.0.2 (endpoint a here, b on host beta), 10.9.0.3 (endpoint b on host beta b1, which is used, c on host gamma c1), fd00::3 (endpoint b on host beta b1, c on host gamma c1), and 9 more", false},
		{"address drawn", func(v *view) {
			v.networks = []networkReply{{Network: store.Network{VNI: 4096}, Twice: slices.Repeat([]string{"x"}, 12)}}
		}, "x, and 2 more → remove one of the two containers and start it again; give each host its own --ip-range, or use --ipam-driver weft:latest; a host that draws to itself what is not its own: weft encryption revoke HOST", false},
		{"same subnets", func(v *view) {
			v.networks = []networkReply{{Network: store.Network{VNI: 4098}, Alike: []string{"network 4097 on host beta"}}}
		}, "network 4098 has the same subnets as network 4097 on host beta: they are not connected", true},
		{"services, and no program", func(v *view) {
			v.status.Program = "off: " + switchedOff
			v.networks = []networkReply{{Network: store.Network{VNI: 4098}, Endpoints: 1, Services: []string{"web", "db"}}, {Endpoints: 1}, {Services: []string{"elsewhere"}}}
		}, "network 4098: this host's containers get no answer from virtual addresses of services (web, db): the port program is off: switched off by WEFT_PROGRAM=off", false},
		{"services, and no fast path", func(v *view) {
			v.networks = []networkReply{{Network: store.Network{VNI: 4098, SlowPath: true}, Endpoints: 1, Services: []string{"web"}}, {Endpoints: 1, Services: []string{"db"}}}
		}, "virtual addresses of services (web): the network has fastpath=false", false},
		{"refused", func(v *view) {
			v.refused = map[store.NetworkID]driver.Refusal{"uevk9dbp5kwsf7p8jnic6u85c": {Reason: "option vni: 0"}}
		},
			"Swarm network uevk9dbp5kws is not allocated, and its tasks wait: option vni: 0", false},
		{"refused here", func(v *view) {
			v.refused = map[store.NetworkID]driver.Refusal{"uevk9dbp5kwsf7p8jnic6u85c": {Reason: "subnet 10.1.0.0/16 overlaps", Here: true}}
		},
			"Swarm network uevk9dbp5kws is not on this host, and its tasks do not start here: subnet 10.1.0.0/16 overlaps", false},
		{"gossip down", func(v *view) { v.clusterErr = errors.New("port 4796 is taken") }, "other hosts are not heard: port 4796 is taken", false},
		{"twin", func(v *view) { v.twin = "192.0.2.7" }, "host 192.0.2.7 has the same identity", false},
		{"nobody heard", func(v *view) { v.status.Join = []string{"a:1"} }, "no other host was ever heard (WEFT_JOIN=a:1)", false},
		{"silent peer", func(v *view) { v.peers = peer(func(p *peerReply) { p.Alive, p.Hidden, p.DeadSince = false, true, at }) },
			"silent hosts: beta (192.0.2.2) since 2026-11-24 12:00:00 UTC, its endpoints are hidden", false},
		{"silent since the start", func(v *view) { v.peers = peer(func(p *peerReply) { p.Alive = false }) }, "beta (192.0.2.2), not heard since this plugin started", false},
		{"other key", func(v *view) { v.otherKey = 3 }, "set the same WEFT_KEY_FILE or WEFT_KEY", false},
		{"unread peer", func(v *view) { v.peers = peer(func(p *peerReply) { p.LastErr = "no route to host" }) }, "records of host beta (192.0.2.2) cannot be fetched: no route to host", false},
		{"peer that others reach", func(v *view) {
			v.peers = peer(func(p *peerReply) {
				p.Cut, p.Via, p.LastErr = true, netip.MustParseAddr("198.51.100.7"), "i/o timeout"
			})
		}, "host beta (198.51.100.7) is alive, as others tell, but this host does not reach it: i/o timeout", false},
		{"no key", func(v *view) {
			v.status.Join, v.status.Encrypted, v.peers = []string{"a:1"}, false, peer(func(*peerReply) {})
		}, "no key is set", true},
		{"no program", func(v *view) { v.status.Program = "off: load the port program: operation not permitted" }, "the port program is off: load the port program: operation not permitted", true},
		{"rules of the admin", func(v *view) { v.status.UserRules, v.networks = 2, []networkReply{{}} }, "2 rules in DOCKER-USER do not see", true},
		{"lock", func(v *view) { v.status.IPTables, v.xtablesShared = "legacy", false }, "xtables.source=/run/xtables.lock", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := well()
			c.change(&v)
			got := problems(v)
			if len(got) != 1 || !strings.Contains(got[0].Text+" → "+got[0].Remedy, c.want) || got[0].Advice != c.advice {
				t.Errorf("got %+v, want one with %q", got, c.want)
			}
		})
	}
}

// Docker tells the plugin nothing when a network goes that was refused; on a manager
// it knows.
func TestRefusalEndsWithTheNetwork(t *testing.T) {
	told := func(v swarmView) (text string) {
		for _, p := range v.current([]problem{{Text: "a", Network: "there"}, {Text: "b", Network: "gone"}, {Text: "c"}}) {
			text += p.Text
		}
		return text
	}
	if got := told(swarmView{ids: map[store.NetworkID]bool{"there": true}}); got != "ac" {
		t.Errorf("a manager is told %q, want a and c", got)
	}
	if got := told(swarmView{}); got != "abc" {
		t.Errorf("where Docker does not tell, %q is told, want all", got)
	}
}

// What cannot change by waiting does not say that it is tried again.
func TestWrongSettingsAreNotTriedAgain(t *testing.T) {
	wrong := func(name, value string) error {
		_, err := parseSettings(func(n string) string {
			if n == name {
				return value
			}
			return ""
		}, os.ReadFile)
		return err
	}
	for _, c := range []struct {
		fault error
		want  string
	}{
		{wrong("WEFT_KEY_FILE", "/does/not/exist"), "are read when the plugin starts"},
		{wrong("WEFT_PORT", "x"), "are read when the plugin starts"},
		{errors.New("database /var/lib/weft/weft.db: timeout"), "tried again every few seconds"},
		{errors.New("setting up the kernel failed"), "tried again every few seconds"},
	} {
		if p := unreadyProblem("starting", c.fault); !strings.Contains(p.Remedy, c.want) || !strings.Contains(p.Text, c.fault.Error()) {
			t.Errorf("%v: %+v does not say %q", c.fault, p, c.want)
		}
	}
}
