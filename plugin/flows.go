package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// flowsOff is why flows are not counted when they are not meant to be.
const flowsOff = "switched off by WEFT_FLOWS=off"

// flows names what the records know of the ends of flows.
func (s *services) flows() ([]flowReply, error) {
	all, err := s.kernel.Flows()
	if errors.Is(err, kernel.ErrNoFlows) {
		return nil, fmt.Errorf("%w: %s", err, flowsOff)
	}
	if err != nil {
		return nil, fmt.Errorf("flows are not counted: %w", err)
	}
	eps, err := s.endpoints()
	if err != nil {
		return nil, err
	}
	return nameFlows(all, eps), nil
}

func nameFlows(all []kernel.Flow, eps []endpointReply) []flowReply {
	type place struct {
		vni store.VNI
		at  netip.Addr
	}
	byLink, byPlace, networks := map[string]endpointReply{}, map[place]endpointReply{}, map[store.VNI]store.NetworkID{}
	for _, e := range eps {
		networks[e.VNI] = e.Network
		if e.State == "left" {
			continue // another may have its address
		}
		if e.Local {
			byLink[e.Link] = e
		}
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			if a.IsValid() {
				byPlace[place{e.VNI, a}] = e
			}
		}
	}
	out := make([]flowReply, 0, len(all))
	for _, f := range all {
		r := flowReply{VNI: f.VNI, Network: networks[f.VNI], Virtual: f.Service, Protocol: protocolName(f.Protocol), Port: f.Port, Verdict: f.Verdict,
			Packets: f.Packets, Bytes: f.Bytes, First: f.First, Last: f.Last}
		r.Source, r.Destination = flowEnd{Address: f.Source}, flowEnd{Address: f.Destination}
		if e, ok := byLink[f.Link]; ok && f.Link != "" {
			r.Source.is(e)
			local := f.Source.Is6() && f.Source.IsLinkLocalUnicast() // every container has one
			r.Source.Pretends = f.Source != e.IPv4 && f.Source != e.IPv6 && !local && !f.Source.IsUnspecified()
		}
		if e, ok := byPlace[place{f.VNI, f.Destination}]; ok {
			r.Destination.is(e)
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b flowReply) int {
		return cmp.Or(cmp.Compare(a.VNI, b.VNI), a.Source.Address.Compare(b.Source.Address), a.Destination.Address.Compare(b.Destination.Address),
			cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Verdict, b.Verdict), a.Virtual.Compare(b.Virtual),
			cmp.Compare(a.Source.Endpoint, b.Source.Endpoint), a.First.Compare(b.First))
	})
	return out
}

func (e *flowEnd) is(known endpointReply) {
	e.Endpoint, e.Host, e.Local = known.ID, known.Host, known.Local
}

// protocolName returns the name of an IP protocol, or its number.
func protocolName(p uint8) string {
	if name, ok := map[uint8]string{1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 50: "esp", 58: "icmp6", 132: "sctp"}[p]; ok {
		return name
	}
	return strconv.Itoa(int(p))
}
