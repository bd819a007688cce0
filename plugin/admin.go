package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/store/gossip"
)

// adminLimit bounds a request on the admin socket.
const adminLimit = 20 * time.Second

// adminHandler returns the admin API. A GET only reads.
func (p *process) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", p.metrics.handler())
	mux.HandleFunc("GET /v1/version", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, versionReply{Version: buildVersion(), Go: runtime.Version()})
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		s, err := p.status()
		answer(w, s, err)
	})
	handle := func(pattern string, fn func(context.Context, *services, *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), adminLimit)
			defer cancel()
			svc, err := p.gate.wait(ctx)
			if err != nil {
				writeJSON(w, http.StatusServiceUnavailable, adminError{err.Error()})
				return
			}
			v, err := fn(ctx, svc, r)
			answer(w, v, err)
		})
	}
	on := func(path string, fn func(context.Context, *services, *http.Request) (any, error)) {
		handle("GET "+path, fn)
	}
	on("/v1/networks", func(_ context.Context, s *services, _ *http.Request) (any, error) { return s.networks() })
	on("/v1/endpoints", func(_ context.Context, s *services, _ *http.Request) (any, error) { return s.endpoints() })
	on("/v1/peers", func(ctx context.Context, s *services, _ *http.Request) (any, error) {
		crypt, err := s.encryption(ctx)
		if err != nil {
			return nil, err
		}
		return s.peers(crypt)
	})
	on("/v1/ipam", func(_ context.Context, s *services, _ *http.Request) (any, error) { return s.ipam.Status() })
	on("/v1/plan", func(ctx context.Context, s *services, r *http.Request) (any, error) {
		return s.plan(ctx, r.URL.Query().Get("network"))
	})
	handle("POST /v1/forget", func(ctx context.Context, s *services, r *http.Request) (any, error) {
		return s.forget(ctx, store.NetworkID(r.URL.Query().Get("network")), r.URL.Query().Get("pools") != "keep")
	})
	on("/v1/encryption", func(ctx context.Context, s *services, _ *http.Request) (any, error) { return s.encryption(ctx) })
	handle("POST /v1/encryption/rotate", func(_ context.Context, s *services, _ *http.Request) (any, error) { return struct{}{}, s.changeKey() })
	for verb, out := range map[string]bool{"revoke": true, "restore": false} {
		handle("POST /v1/encryption/"+verb, func(ctx context.Context, s *services, r *http.Request) (any, error) {
			return s.revoke(ctx, r.URL.Query().Get("host"), out)
		})
	}
	on("/v1/flows", func(_ context.Context, s *services, _ *http.Request) (any, error) { return s.flows() })
	on("/v1/audit", func(ctx context.Context, s *services, _ *http.Request) (any, error) { return s.audit(ctx) })
	return mux
}

func answer(w http.ResponseWriter, v any, err error) {
	switch {
	case errors.Is(err, store.ErrNotFound):
		writeJSON(w, http.StatusNotFound, adminError{err.Error()})
	case err != nil:
		writeJSON(w, http.StatusInternalServerError, adminError{err.Error()})
	default:
		writeJSON(w, http.StatusOK, v)
	}
}

// countRecords counts what the database holds.
func countRecords(db *store.DB) (c recordCounts, err error) {
	err = db.View(func(tx *store.Tx) error {
		nets, err := tx.Networks()
		if err != nil {
			return err
		}
		c.Networks = len(nets)
		for _, n := range nets {
			remote, err := tx.RemoteCount(n.VNI)
			if err != nil {
				return err
			}
			c.Remote += remote
		}
		eps, err := tx.AllEndpoints()
		if err != nil {
			return err
		}
		c.Endpoints = len(eps)
		peers, err := tx.Peers()
		if err != nil {
			return err
		}
		for _, p := range peers {
			switch {
			case p.Hidden:
				c.PeersHidden++
			case !p.DeadSince.IsZero():
				c.PeersDead++
			default:
				c.PeersAlive++
			}
		}
		return countLeases(tx, &c)
	})
	return c, err
}

func countLeases(tx *store.Tx, c *recordCounts) error {
	pools, err := tx.Pools()
	if err != nil {
		return err
	}
	c.Pools = len(pools)
	for _, p := range pools {
		leases, err := tx.Leases(p.ID)
		if err != nil {
			return err
		}
		for _, l := range leases {
			if l.Freed.IsZero() {
				c.Leases++
			} else {
				c.Cooling++
			}
		}
	}
	return nil
}

func (s *services) networks() ([]networkReply, error) {
	out := []networkReply{}
	status := map[store.VNI]dataplane.NetworkStatus{}
	for _, st := range s.loop.Status() {
		status[st.VNI] = st
	}
	err := s.db.View(func(tx *store.Tx) error {
		nets, err := tx.Networks()
		if err != nil {
			return err
		}
		for _, n := range nets {
			around, err := tx.Around(n)
			if err != nil {
				return err
			}
			r := networkReply{Network: withoutKey(n), EffectiveMTU: dataplane.InnerMTU(n, s.db.Self(), around, s.loop.Underlay()),
				Peers: []string{}, Status: status[n.VNI]}
			if !n.Routed() {
				r.Bridge = dataplane.BridgeName(n.VNI)
			}
			eps, err := tx.Endpoints(n.ID)
			if err != nil {
				return err
			}
			r.Endpoints = len(eps)
			if r.Remote, err = tx.RemoteCount(n.VNI); err != nil {
				return err
			}
			runs, err := tx.RunBy(n.VNI)
			if err != nil {
				return err
			}
			for _, run := range runs {
				name := peerName(tx, run.Owner)
				switch {
				case n.Runs(run):
					r.Peers = append(r.Peers, name)
				case n.Shared().Agrees(run.SharedNetwork):
					r.Disagree = append(r.Disagree, name+" (another key, or none)")
				default:
					r.Disagree = append(r.Disagree, fmt.Sprintf("%s (%s %v)", name, run.Mode, run.Prefixes))
				}
			}
			alike, err := tx.Alike(n)
			if err != nil {
				return err
			}
			for _, o := range alike {
				if o.VNI != n.VNI {
					r.Alike = append(r.Alike, fmt.Sprintf("network %d on host %s", o.VNI, peerName(tx, o.Owner)))
				}
			}
			r.Twice = twice(r.Status)
			if r.Services, r.Crowded, err = served(tx, n); err != nil {
				return err
			}
			out = append(out, r)
		}
		return nil
	})
	slices.SortFunc(out, func(a, b networkReply) int { return int(a.VNI) - int(b.VNI) })
	return out, err
}

// served names the services that have a virtual address on the network, and says which of
// them have more tasks than the port program leads to.
func served(tx *store.Tx, n store.Network) (names, crowded []string, err error) {
	all, err := tx.Services(n)
	for _, s := range all {
		names = append(names, s.Name)
		if len(s.Backends) > dataplane.MaxBackends {
			crowded = append(crowded, fmt.Sprintf("%s (%s) has %d", s.Name, s.VIP, len(s.Backends)))
		}
	}
	return names, crowded, err
}

// twice names the addresses that endpoints of two living hosts have. Two that do not hear
// each other may both give one away.
func twice(s dataplane.NetworkStatus) (out []string) {
	for _, c := range s.Contests {
		other := fmt.Sprintf("%.12s on host %s", c.Other.Endpoint, c.Other.Name)
		if c.Used.Here {
			out = append(out, fmt.Sprintf("%s (endpoint %.12s here, %s)", c.What, c.Used.Endpoint, other))
			continue
		}
		used := ", which is used"
		if c.Open {
			used = ""
		}
		// Two hosts may have one name, if one of them wants it.
		out = append(out, fmt.Sprintf("%s (endpoint %.12s on host %s %.12s%s, %s %.12s)", c.What, c.Used.Endpoint, c.Used.Name, c.Used.Host, used, other, c.Other.Host))
	}
	return out
}

// withoutKey hides a network's key.
func withoutKey(n store.Network) store.Network {
	n.Key = nil
	n.Options = driver.Shown(n.Options)
	return n
}

func peerName(tx *store.Tx, id store.HostID) string {
	if p, err := tx.Peer(id); err == nil && p.Name != "" {
		return p.Name
	}
	return string(id)
}

func (s *services) swarm() (r swarmReply, err error) {
	err = s.db.View(func(tx *store.Tx) error {
		nodes, err := tx.Nodes()
		for _, n := range nodes {
			if n.Self {
				r.Self = n.Address
				continue
			}
			r.Discovered = append(r.Discovered, n.Address)
			if n.Gone {
				r.Gone = append(r.Gone, n.Address)
			}
		}
		return err
	})
	return r, err
}

func (s *services) endpoints() ([]endpointReply, error) {
	out := []endpointReply{}
	self := s.db.Self().Name
	err := s.db.View(func(tx *store.Tx) error {
		nets, err := tx.Networks()
		if err != nil {
			return err
		}
		for _, n := range nets {
			eps, err := tx.Endpoints(n.ID)
			if err != nil {
				return err
			}
			missing := s.loop.Missing(n.VNI)
			for _, e := range eps {
				out = append(out, endpointReply{ID: e.ID, VNI: e.VNI, Network: n.ID, Host: self, Local: true,
					State: endpointState(e, missing), MAC: e.MAC, IPv4: e.IPv4.Addr(), IPv6: e.IPv6.Addr(),
					Link: e.ID.HostLink(), Sandbox: e.Sandbox, Ports: e.Ports})
			}
			remote, err := tx.RemoteEndpoints(n.VNI)
			if err != nil {
				return err
			}
			for _, e := range remote {
				p, err := tx.Peer(e.Owner)
				if err != nil {
					return err
				}
				state := "remote"
				if p.Hidden {
					state = "hidden"
				}
				out = append(out, endpointReply{ID: e.ID, VNI: n.VNI, Network: n.ID, Host: p.Name, State: state,
					MAC: e.MAC, IPv4: e.IPv4, IPv6: e.IPv6})
			}
		}
		return nil
	})
	for i, e := range out {
		if !e.Local {
			continue
		}
		if c, err := s.kernel.CountersOf(e.Link); err == nil {
			out[i].Program = &c
		}
	}
	slices.SortStableFunc(out, func(a, b endpointReply) int {
		if a.VNI != b.VNI {
			return int(a.VNI) - int(b.VNI)
		}
		return a.IPv4.Compare(b.IPv4)
	})
	return out, err
}

func endpointState(e store.Endpoint, missing []store.EndpointID) string {
	switch {
	case e.Left:
		return "left"
	case slices.Contains(missing, e.ID):
		return "missing"
	case e.Sandbox == "":
		return "made"
	}
	return "joined"
}

func (s *services) peers(crypt encryptionReply) ([]peerReply, error) {
	out := []peerReply{}
	self, u := s.db.Self(), s.loop.Underlay()
	err := s.db.View(func(tx *store.Tx) error {
		own, err := tx.Networks()
		if err != nil {
			return err
		}
		all, err := tx.Peers()
		if err != nil {
			return err
		}
		for _, p := range all {
			r := peerReply{Peer: p, Alive: p.DeadSince.IsZero(), Networks: []store.VNI{}}
			r.Via = self.AddressOf(p.Host, u.Near(p))
			nets, err := tx.PeerNetworks(p.ID)
			if err != nil {
				return err
			}
			r.Way, r.VXLAN = way(self, p, own, nets, u)
			for _, n := range nets {
				r.Networks = append(r.Networks, n.VNI)
			}
			out = append(out, r)
		}
		return nil
	})
	silentTunnels(out, crypt)
	members, _ := s.cluster.get()
	if members == nil {
		return out, err
	}
	heard := map[store.HostID]gossip.PeerStatus{}
	for _, m := range members.Peers() {
		heard[m.ID] = m
	}
	for i, r := range out {
		if m, ok := heard[r.ID]; ok {
			out[i].Alive, out[i].InSync, out[i].LastErr, out[i].Cut = m.Alive, m.InSync, m.LastErr, m.Alive && m.Cut
		}
	}
	return out, err
}

func (s *services) plan(ctx context.Context, name string) (planReply, error) {
	id, vni, err := s.find(name)
	if err != nil {
		return planReply{}, err
	}
	want, have, ops, err := s.loop.Explain(ctx, vni)
	if err != nil {
		return planReply{}, err
	}
	return planReply{Network: id, VNI: vni, Want: lines(want.Sorted()), Have: lines(have.Sorted()), Ops: lines(ops)}, nil
}

func lines[T fmt.Stringer](all []T) []string {
	out := make([]string, 0, len(all))
	for _, o := range all {
		out = append(out, o.String())
	}
	return out
}

// audit compares records and kernel: the host, each network that is recorded, and
// each of which the kernel holds a link.
func (s *services) audit(ctx context.Context) (auditReply, error) {
	out := auditReply{Differences: []difference{}}
	nets := map[store.VNI]store.NetworkID{store.HostVNI: ""}
	found, err := s.kernel.Networks(ctx)
	if err != nil {
		return out, err
	}
	for _, v := range found {
		nets[v] = ""
	}
	if err := s.db.View(func(tx *store.Tx) error {
		all, err := tx.Networks()
		for _, n := range all {
			nets[n.VNI] = n.ID
		}
		return err
	}); err != nil {
		return out, err
	}
	vnis := make([]store.VNI, 0, len(nets))
	for v := range nets {
		vnis = append(vnis, v)
	}
	slices.Sort(vnis)
	for _, v := range vnis {
		want, have, ops, err := s.loop.Explain(ctx, v)
		if err != nil {
			return out, err
		}
		add := func(text string) {
			out.Differences = append(out.Differences, difference{Between: "records, kernel", Network: nets[v], VNI: v, Text: text})
		}
		for _, op := range ops {
			add(op.String())
		}
		for _, text := range missingLinks(want, have) {
			add(text)
		}
	}
	return out, nil
}

// missingLinks names the links that Docker has taken and that are gone: no
// operation can bring them back.
func missingLinks(want, have dataplane.Plan) []string {
	var out []string
	for _, o := range want.Sorted() {
		if v, ok := o.(dataplane.Veth); ok && v.Joined && have[o.Key()] == nil {
			out = append(out, fmt.Sprintf("! %s: the link is gone and cannot be made again; restart the container", v))
		}
	}
	return out
}
