package driver

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/weftnet/weft/store"
)

// settings is what the options of a network say.
type settings struct {
	mode     string
	gateway  string // "docker", "weft", or "" for the mode's own
	noMasq   bool
	vni      store.VNI // 0: choose one
	mtu      int       // bytes; 0: automatic
	internal bool
	// encrypted: between hosts by WireGuard alone
	encrypted                bool
	ifname                   string
	unguarded, slow, anyType bool
	key                      []byte // of the network, or nil
	meet                     []netip.Addr
}

// Option is one key of `docker network create -o KEY=VALUE`.
type Option struct {
	Key     string
	Aliases []string // Docker's own names for it; weft.KEY is understood too
	Default string
	Help    string
	set     func(*settings, string) error
}

// options returns the table of all network options. README's table is printed
// from it.
func options() []Option {
	return []Option{
		{Key: "mode", Default: store.ModeVXLAN, Help: "datapath between the hosts: `vxlan`, one Ethernet segment; or `routed`, without broadcast: each host routes to its containers, by plain routes to hosts on the same link, through VXLAN to others",
			set: func(s *settings, v string) error {
				if v != store.ModeVXLAN && v != store.ModeRouted {
					return fmt.Errorf("%s is not a mode; use vxlan or routed", clip(v))
				}
				s.mode = v
				return nil
			}},
		{Key: "vni", Aliases: []string{"com.docker.network.driver.overlay.vxlanid_list"}, Default: "that of a peer's network with the same subnets, else the next free one from 4096",
			Help: "VXLAN network identifier, 1 to 16777215; the same VNI on two hosts is the same network",
			set: func(s *settings, v string) error {
				if strings.Contains(v, ",") {
					return fmt.Errorf("%s is a list; a network has one vni for all its subnets", clip(v))
				}
				n, err := strconv.ParseUint(v, 10, 32)
				if err != nil || n < 1 || n > uint64(store.MaxVNI) {
					return fmt.Errorf("%s is not a vni; choose a number from 1 to %d", clip(v), store.MaxVNI)
				}
				s.vni = store.VNI(n)
				return nil
			}},
		{Key: "mtu", Aliases: []string{"com.docker.network.driver.mtu"}, Default: "underlay minus 50 (IPv4) or 70 (IPv6); routed: the underlay's; encrypted: minus 60 or 80",
			Help: "MTU of the containers' interfaces in bytes, 68 to 65535 (1280 or more with IPv6)",
			set: func(s *settings, v string) error {
				n, err := strconv.Atoi(v)
				if err != nil || n < 68 || n > 65535 {
					return fmt.Errorf("%s is not an MTU; choose a number from 68 to 65535", clip(v))
				}
				s.mtu = n
				return nil
			}},
		{Key: "gateway", Default: "`docker`; `weft` with `mode=routed`", Help: "who leads out of the network; `docker`: docker_gwbridge masquerades and publishes ports, by a second interface of each container, and shows them in `docker ps`; `weft`: the network's own gateway, on every host",
			set: func(s *settings, v string) error {
				if v != gatewayDocker && v != gatewayWeft {
					return fmt.Errorf("%s is not a gateway; use docker or weft", clip(v))
				}
				s.gateway = v
				return nil
			}},
		{Key: "masquerade", Aliases: []string{"com.docker.network.bridge.enable_ip_masquerade"}, Default: "true", Help: "what leaves a network with `gateway=weft` has the host's address; false where the fabric routes back to containers",
			set: func(s *settings, v string) error {
				on, err := parseBool(v)
				s.noMasq = !on
				return err
			}},
		{Key: "internal", Aliases: []string{"com.docker.network.internal"}, Default: "false", Help: "no way out of the network; the same as `--internal`",
			set: func(s *settings, v string) (err error) {
				s.internal, err = parseBool(v)
				return err
			}},
		{Key: "encrypted", Default: "false", Help: "between hosts everything goes through WireGuard, nothing ever plain; needs a cluster key (`WEFT_KEY_FILE`) or one of the network (`key`), which those of Swarm have under `WEFT_SCOPE=global`. Hosts route to its containers, also with `mode=vxlan`: broadcast does not reach others",
			set: func(s *settings, v string) (err error) {
				s.encrypted, err = parseBool(v)
				return err
			}},
		{Key: "guard", Default: "true", Help: "containers can send from their own addresses alone, and not as a router, DHCP server or bridge; false for one that takes over addresses (keepalived) or forwards",
			set: func(s *settings, v string) error {
				on, err := parseBool(v)
				s.unguarded = !on
				return err
			}},
		{Key: "fastpath", Default: "true", Help: "packets between containers of the network go past bridge, routes and iptables of the host; false where rules of yours (`DOCKER-USER`) must see them; virtual addresses of Swarm's services are not answered then, use `dnsrr`",
			set: func(s *settings, v string) error {
				on, err := parseBool(v)
				s.slow = !on
				return err
			}},
		{Key: "ethertypes", Default: "known", Help: "`known`: the guard lets IPv4, IPv6 and ARP pass; `any`: every ethertype but VLAN tags",
			set: func(s *settings, v string) error {
				if v != "known" && v != "any" {
					return fmt.Errorf("%s is neither known nor any", clip(v))
				}
				s.anyType = v == "any"
				return nil
			}},
		{Key: "ifname", Aliases: []string{"com.docker.network.container_iface_prefix"}, Default: "eth", Help: "prefix of the interface name in containers, at most 12 letters, digits, - and _",
			set: func(s *settings, v string) error {
				if !validIfname(v, 12) {
					return fmt.Errorf("%s cannot begin an interface name; use at most 12 letters, digits, - and _, beginning with a letter", clip(v))
				}
				s.ifname = v
				return nil
			}},
		{Key: "key", Help: "key of the network, 64 hex digits: hosts believe each other's records of it only when both have it. Under `WEFT_SCOPE=global` Weft makes one for each network",
			set: func(s *settings, v string) error {
				key, err := hex.DecodeString(v)
				if err != nil || len(key) != keyBytes {
					return fmt.Errorf("it is not a key of %d bytes in hex; make one with: openssl rand -hex %d", keyBytes, keyBytes)
				}
				s.key = key
				return nil
			}},
		{Key: "meet", Help: "addresses of hosts to meet, separated by commas, beside WEFT_JOIN. Under `WEFT_SCOPE=global` Weft gives that of the leader",
			set: func(s *settings, v string) error {
				for _, text := range strings.Split(v, ",") {
					a, err := netip.ParseAddr(strings.TrimSpace(text))
					if err != nil || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Zone() != "" {
						return fmt.Errorf("%s is not the address of a host; write it as 192.0.2.10", clip(text))
					}
					if len(s.meet) == mostMet {
						return fmt.Errorf("more than %d addresses; one that answers is enough", mostMet)
					}
					s.meet = append(s.meet, a.Unmap())
				}
				return nil
			}},
	}
}

// Values of the option gateway.
const (
	gatewayDocker = "docker"
	gatewayWeft   = "weft"
)

const (
	keyBytes = 32 // size of a network's key
	mostMet  = 16 // addresses of hosts to meet
)

// Options returns the table of network options, for the documentation.
func Options() []Option { return options() }

// parseBool reads a switch as Docker's users write it. No value means on.
func parseBool(v string) (bool, error) {
	switch strings.ToLower(v) {
	case "", "true", "1", "yes", "on":
		return true, nil
	case "false", "0", "no", "off":
		return false, nil
	}
	return false, fmt.Errorf("%s is neither true nor false", clip(v))
}

func validIfname(v string, most int) bool {
	if v == "" || len(v) > most || v == "lo" {
		return false
	}
	for i, r := range v {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		if !letter && (i == 0 || (r < '0' || r > '9') && r != '-' && r != '_') {
			return false
		}
	}
	return true
}

// parseOptions reads the -o options of a network. One key twice under different
// names must mean the same: Weft's own answer to Swarm stands beside what the user
// wrote, and spells it in its own way.
func parseOptions(given map[string]string) (settings, error) {
	s := settings{mode: store.ModeVXLAN}
	table := options()
	type first struct {
		key  string
		said settings // by this option alone
	}
	seen := map[string]first{}
	keys := make([]string, 0, len(given))
	for k := range given {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		i := slices.IndexFunc(table, func(o Option) bool {
			return k == o.Key || k == "weft."+o.Key || slices.Contains(o.Aliases, k)
		})
		if i < 0 {
			return s, fmt.Errorf("option %s is not known%s; the README lists them all", clip(k), nearest(k, table))
		}
		o := table[i]
		var alone settings
		if err := o.set(&alone, given[k]); err != nil {
			return s, fmt.Errorf("option %s: %w", k, err)
		}
		if f, twice := seen[o.Key]; twice {
			if !reflect.DeepEqual(f.said, alone) {
				return s, fmt.Errorf("options %s=%s and %s=%s contradict each other; give one of them", f.key, clip(shown(f.key, given[f.key])), k, clip(shown(k, given[k])))
			}
			continue
		}
		seen[o.Key] = first{k, alone}
		_ = o.set(&s, given[k]) // as above
	}
	return s, s.agree()
}

// agree refuses options that do not go together.
func (s settings) agree() error {
	switch routed := s.mode == store.ModeRouted; {
	case routed && s.gateway == gatewayDocker:
		return fmt.Errorf("options mode=routed and gateway=docker do not go together: a routed network has its own gateway; leave gateway out, or use mode=vxlan")
	case !routed && s.gateway != gatewayWeft && s.noMasq:
		return fmt.Errorf("option masquerade=false needs gateway=weft: docker_gwbridge masquerades always")
	}
	return nil
}

// nearest names the known option whose spelling is closest, if any is close.
func nearest(k string, table []Option) string {
	best, at := "", len(k)/2+1
	for _, o := range table {
		for _, name := range append([]string{o.Key, "weft." + o.Key}, o.Aliases...) {
			if d := distance(strings.ToLower(k), name); d < at {
				best, at = name, d
			}
		}
	}
	if best == "" {
		return ""
	}
	return ", did you mean " + best + "?"
}

// distance is the Levenshtein distance. Long keys are cut: they are no typing
// error.
func distance(a, b string) int {
	a, b = a[:min(len(a), 64)], b[:min(len(b), 64)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// clip quotes a value of the user's for a message, shortened.
func clip(v string) string {
	const most = 80
	if len(v) > most {
		return strconv.Quote(v[:most]) + "…"
	}
	return strconv.Quote(v)
}
