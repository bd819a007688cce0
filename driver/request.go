package driver

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/store"
)

// Keys of Docker's requests (moby daemon/libnetwork/netlabel).
const (
	keyGeneric  = "com.docker.network.generic"
	keyInternal = "com.docker.network.internal"
	keyMAC      = "com.docker.network.endpoint.macaddress"
	keyIfname   = "com.docker.network.endpoint.ifname"
	dockerKeys  = "com.docker."
)

// checkID accepts Docker's ids: 64 hex digits or 25 base-36 ones, and what other
// engines may use, but nothing that could be a path.
func checkID(field, id string) error {
	if id == "" {
		return fmt.Errorf("%s is empty", field)
	}
	if len(id) > 128 {
		return fmt.Errorf("%s has %d characters; an id has at most 128", field, len(id))
	}
	for _, r := range id {
		if (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-' && r != '_' {
			return fmt.Errorf("%s %s is not an id; it may hold letters, digits, - and _", field, clip(id))
		}
	}
	return nil
}

// parseNetwork turns Docker's request into a record without a VNI of its own
// choice (0 if none was asked for). It looks at the request alone.
func parseNetwork(r network.CreateNetworkRequest) (store.Network, error) {
	var n store.Network
	if err := checkID("NetworkID", r.NetworkID); err != nil {
		return n, err
	}
	given, err := genericOptions(r.Options)
	if err != nil {
		return n, err
	}
	s, err := parseOptions(given)
	if err != nil {
		return n, err
	}
	if v, ok := r.Options[keyInternal]; ok {
		on, isBool := v.(bool)
		if !isBool {
			return n, fmt.Errorf("Options: %s is %s; it must be true or false", keyInternal, clip(fmt.Sprint(v)))
		}
		s.internal = s.internal || on
	}
	n = store.Network{ID: store.NetworkID(r.NetworkID), VNI: s.vni, Mode: s.mode, MTU: s.mtu, Internal: s.internal, Encrypted: s.encrypted, NoMasquerade: s.noMasq, GatewayWeft: s.gateway == gatewayWeft && s.mode != store.ModeRouted,
		Unguarded: s.unguarded, SlowPath: s.slow, AnyEthertype: s.anyType, Ifname: s.ifname, Options: given, Key: s.key, Meet: s.meet}
	// In Swarm an IPv6 subnet may come in the IPv4 list: the address decides.
	for i, d := range slices.Concat(r.IPv4Data, r.IPv6Data) {
		field := fmt.Sprintf("IPv4Data[%d]", i)
		if i >= len(r.IPv4Data) {
			field = fmt.Sprintf("IPv6Data[%d]", i-len(r.IPv4Data))
		}
		if d == nil {
			return n, fmt.Errorf("%s is null", field)
		}
		sub, err := parseSubnet(field, *d)
		if err != nil {
			return n, err
		}
		for _, o := range n.Subnets {
			if o.Pool.Overlaps(sub.Pool) {
				return n, fmt.Errorf("subnets %s and %s of the network overlap", o.Pool, sub.Pool)
			}
		}
		n.Subnets = append(n.Subnets, sub)
	}
	for _, sub := range n.Subnets {
		if (n.Routed() || n.OwnGateway()) && !sub.Gateway.IsValid() {
			return n, fmt.Errorf("subnet %s has no gateway, which a network needs that is routed, encrypted or has gateway=weft; give one with --gateway", sub.Pool)
		}
	}
	if len(n.Subnets) == 0 {
		return n, fmt.Errorf("the network has no subnet; give one with --subnet, or leave --ipam-driver out")
	}
	if s.mtu != 0 && s.mtu < 1280 && slices.ContainsFunc(n.Subnets, func(s store.Subnet) bool { return s.Pool.Addr().Is6() }) {
		return n, fmt.Errorf("option mtu: %d is too small for IPv6; choose 1280 or more", s.mtu)
	}
	return n, nil
}

func genericOptions(options map[string]any) (map[string]string, error) {
	out := map[string]string{}
	generic, ok := options[keyGeneric]
	if !ok || generic == nil {
		return out, nil
	}
	m, ok := generic.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("Options: %s is not a map of options", keyGeneric)
	}
	for k, v := range m {
		s, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("option %s: %s is not text", clip(k), clip(fmt.Sprint(v)))
		}
		out[k] = s
	}
	return out, nil
}

func parseSubnet(field string, d network.IPAMData) (store.Subnet, error) {
	var s store.Subnet
	pool, err := netip.ParsePrefix(d.Pool)
	if err != nil {
		return s, fmt.Errorf("%s: pool %s is not a subnet; write it as 10.32.0.0/16", field, clip(d.Pool))
	}
	switch a := pool.Addr(); {
	case pool.Bits() == 0:
		return s, fmt.Errorf("%s: pool %s is everything; Weft needs a subnet (an IPAM driver that gives none, as null does, cannot be used)", field, pool)
	case pool != pool.Masked():
		return s, fmt.Errorf("%s: pool %s has host bits set; write %s", field, pool, pool.Masked())
	case a.Is4In6():
		return s, fmt.Errorf("%s: pool %s is an IPv4 address in IPv6 form; write it as IPv4", field, pool)
	case pool.Bits() == a.BitLen():
		return s, fmt.Errorf("%s: pool %s has room for one address; choose a larger one", field, pool)
	case a.IsMulticast(), a.IsLoopback(), a.IsLinkLocalUnicast():
		return s, fmt.Errorf("%s: pool %s is not for unicast use; choose a private subnet", field, pool)
	}
	s.Pool = pool
	if d.Gateway != "" {
		gw, err := netip.ParsePrefix(d.Gateway)
		if err != nil {
			return s, fmt.Errorf("%s: gateway %s is not an address with prefix length", field, clip(d.Gateway))
		}
		if !pool.Contains(gw.Addr()) {
			return s, fmt.Errorf("%s: gateway %s is outside pool %s; choose one inside it", field, gw.Addr(), pool)
		}
		s.Gateway = gw.Addr()
	}
	for name, v := range d.AuxAddresses {
		text, _ := v.(string)
		aux, err := netip.ParsePrefix(text)
		if err != nil || !pool.Contains(aux.Addr()) {
			return s, fmt.Errorf("%s: aux address %s=%s is not an address inside pool %s", field, clip(name), clip(fmt.Sprint(v)), pool)
		}
		if s.Aux == nil {
			s.Aux = map[string]netip.Prefix{}
		}
		s.Aux[name] = aux
	}
	return s, nil
}

// parseEndpoint turns Docker's request into a record for network n.
func parseEndpoint(r network.CreateEndpointRequest, n store.Network) (store.Endpoint, error) {
	e := store.Endpoint{ID: store.EndpointID(r.EndpointID), Network: n.ID, VNI: n.VNI}
	var given network.EndpointInterface
	if r.Interface != nil {
		given = *r.Interface
	}
	var err error
	if e.IPv4, err = parseAddress("Interface.Address", given.Address, n, false); err != nil {
		return e, err
	}
	if e.IPv6, err = parseAddress("Interface.AddressIPv6", given.AddressIPv6, n, true); err != nil {
		return e, err
	}
	if !e.IPv4.IsValid() && !e.IPv6.IsValid() {
		return e, fmt.Errorf("Interface has neither Address nor AddressIPv6; Weft does not choose addresses here (its IPAM driver does: --ipam-driver)")
	}
	if e.Options, err = endpointOptions(r.Options, &e); err != nil {
		return e, err
	}
	mac := given.MacAddress
	if mac == "" {
		mac = macOption(r.Options)
	}
	if mac != "" {
		e.MAC, err = store.ParseMAC(mac)
		e.OwnMAC = given.MacAddress == "" // Docker refuses an answer to what it gave
		return e, err
	}
	// The same address has the same MAC, so that neighbours' caches stay right
	// when a container comes back.
	seed := e.IPv4.Addr()
	if !seed.IsValid() {
		seed = e.IPv6.Addr()
	}
	e.MAC, e.OwnMAC = store.DeriveMAC("endpoint", fmt.Sprint(n.VNI), seed.String()), true
	return e, nil
}

func parseAddress(field, text string, n store.Network, v6 bool) (netip.Prefix, error) {
	if text == "" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, fmt.Errorf("%s: %s is not an address with prefix length, as 10.32.0.2/16", field, clip(text))
	}
	if p.Addr().Is6() != v6 || p.Addr().Is4In6() {
		return p, fmt.Errorf("%s: %s is of the wrong family", field, p)
	}
	for _, s := range n.Subnets {
		if s.Pool.Contains(p.Addr()) {
			if p.Addr() == s.Pool.Addr() && s.Pool.Bits() < s.Pool.Addr().BitLen()-1 {
				return p, fmt.Errorf("%s: %s is the address of the subnet itself", field, p.Addr())
			}
			if p.Addr().Is4() && s.Pool.Bits() < 31 && !s.Pool.Contains(p.Addr().Next()) {
				return p, fmt.Errorf("%s: %s is the broadcast address of subnet %s", field, p.Addr(), s.Pool)
			}
			return p, nil
		}
	}
	return p, fmt.Errorf("%s: %s is outside the subnets %v of the network; choose one inside", field, p.Addr(), n.Prefixes())
}

// endpointOptions keeps the user's own per-endpoint options. Those of Docker that
// we do not use are let through, since new engines bring new ones.
func endpointOptions(given map[string]any, e *store.Endpoint) (map[string]string, error) {
	out := map[string]string{}
	for k, v := range given {
		switch {
		case strings.EqualFold(k, keyIfname):
			name, _ := v.(string)
			if !validIfname(name, 15) {
				return nil, fmt.Errorf("option %s: %s is not an interface name; use at most 15 letters, digits, - and _, beginning with a letter", k, clip(fmt.Sprint(v)))
			}
			e.Ifname = name
			out[k] = name
		case strings.HasPrefix(strings.ToLower(k), dockerKeys):
		default:
			return nil, fmt.Errorf("endpoint option %s is not known, did you mean %s?", clip(k), keyIfname)
		}
	}
	return out, nil
}

// macOption reads the MAC that Docker passes as six bytes in base 64.
func macOption(options map[string]any) string {
	text, _ := options[keyMAC].(string)
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(raw) != 6 {
		return ""
	}
	return store.MAC(raw).String()
}
