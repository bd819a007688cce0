package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/store"
)

// Where the plugin may ask Docker: config.json mounts /dev/null there unless the user
// gives it Docker's socket.
const (
	lentSocket = "/run/docker.sock"
	// How often the leader of a Swarm is asked for its services: while some have a
	// virtual address on a network of ours, and else.
	servicesAge = time.Second
	idleAge     = 5 * time.Second
)

// watchServices tells the hosts, where this plugin may ask Docker and this host leads
// the Swarm, which tasks answer for the virtual addresses of services, and logs which of
// those nobody answers. It asks between calls, never in one.
func (p *process) watchServices(ctx context.Context) error {
	if !lent() {
		return nil
	}
	docker := &dockerClient{socket: lentSocket}
	told, failing := map[string]bool{}, false
	for {
		wait := idleAge
		found, err := p.lookAtServices(ctx, docker)
		if err != nil && ctx.Err() == nil && !failing {
			p.log.Warn("services of the Swarm are not looked at; what was told of them stands; trying on", "err", err)
		}
		if failing = err != nil; !failing {
			now := map[string]bool{}
			for _, f := range found.problems {
				if now[f.Text] = true; !told[f.Text] {
					p.log.Warn("the name of a service of the Swarm does not lead to it", "what", f.Text, "type", f.Remedy)
				}
			}
			told = now
			if len(found.services) > 0 {
				wait = servicesAge
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// lent reports whether the plugin may ask Docker.
func lent() bool {
	st, err := os.Stat(lentSocket)
	return err == nil && st.Mode()&os.ModeSocket != 0
}

// swarmServices is what one look at a Swarm's services finds.
type swarmServices struct {
	services []store.Service // with a virtual address on a network of ours
	problems []problem       // of those that nobody answers
}

// lookAtServices asks Docker, and writes what it says into the database, which tells the
// other hosts.
func (p *process) lookAtServices(ctx context.Context, docker *dockerClient) (out swarmServices, err error) {
	svc, _, _ := p.gate.peek()
	if svc == nil {
		return out, nil // the next look finds it
	}
	ctx, cancel := context.WithTimeout(ctx, adminLimit)
	defer cancel()
	var v swarmView
	v.status.Program = programState(p.program)
	var tasks []dockerTask
	leads, err := v.leads(ctx, docker, &tasks)
	if err != nil {
		return out, err
	}
	self := svc.db.Self().ID
	out.services = v.offered(self, tasks)
	var held []store.Service
	told := false
	if err := svc.db.View(func(tx *store.Tx) (err error) {
		if held, err = tx.ServicesOf(self); err == nil {
			told, err = tx.Tells(self, out.services)
		}
		if err == nil {
			v.status.Answered, err = answered(tx)
		}
		return err
	}); err != nil {
		return out, err
	}
	// Who leads no longer withdraws what it told when the next one has told something.
	if replaced := len(v.status.Answered) > len(held); !told && (len(out.services) > 0 || leads || replaced) {
		err = svc.db.Update(ctx, func(tx *store.Tx) error { return tx.PutServices(self, true, out.services) })
		for _, s := range out.services {
			v.status.Answered = append(v.status.Answered, s.VIP)
		}
	}
	out.problems = slices.Concat(v.virtual(), v.oneForSeveral())
	return out, err
}

// leads asks for what a Swarm's leader must know of services; on other hosts nothing is
// found. Several managers would tell the same with a delay.
func (v *swarmView) leads(ctx context.Context, docker *dockerClient, tasks *[]dockerTask) (bool, error) {
	if err := docker.get(ctx, "/info", &v.info); err != nil || !v.info.Swarm.ControlAvailable {
		return false, err
	}
	if err := docker.get(ctx, "/nodes", &v.nodes); err != nil || v.leader() != v.info.Swarm.NodeID {
		return false, err
	}
	var all []dockerNetwork
	if err := docker.get(ctx, "/networks", &all); err != nil {
		return true, err
	}
	for _, n := range all {
		if _, ours := n.Options[driver.OptKey]; ours { // that Weft has allocated
			v.networks = append(v.networks, n)
		}
	}
	if len(v.networks) == 0 {
		return true, nil
	}
	if err := docker.get(ctx, "/services", &v.services); err != nil {
		return true, err
	}
	v.sort()
	if !slices.ContainsFunc(v.services, func(s dockerService) bool { return len(s.Endpoint.VirtualIPs) > 0 }) {
		return true, nil
	}
	return true, docker.get(ctx, "/tasks?filters="+url.QueryEscape(`{"desired-state":["running"]}`), tasks)
}

// offered returns the services with a virtual address on a network of ours, with the
// tasks that run: Swarm says so of one with a health check when it is healthy. Of several
// with one address, as a Swarm restored from an older state may have them, it is the
// oldest's, whatever becomes of their tasks: else connections would change sides.
func (v *swarmView) offered(self store.HostID, tasks []dockerTask) (out []store.Service) {
	type at struct{ service, network string }
	backends, index := map[at][]netip.Addr{}, map[string]uint64{}
	for _, t := range tasks {
		index[t.ServiceID] = max(index[t.ServiceID], t.Version.Index)
		if t.Status.State != "running" || t.DesiredState != "running" {
			continue
		}
		for _, n := range t.NetworksAttachments {
			for _, cidr := range n.Addresses {
				if a, err := netip.ParseAddr(withoutBits(cidr)); err == nil && a.Is4() {
					key := at{t.ServiceID, n.Network.ID}
					backends[key] = append(backends[key], a)
				}
			}
		}
	}
	taken := map[at]bool{} // by an older service
	for _, s := range slices.SortedFunc(slices.Values(v.services), older) {
		for _, ip := range s.Endpoint.VirtualIPs {
			if taken[at{ip.Addr, ip.NetworkID}] {
				continue
			}
			taken[at{ip.Addr, ip.NetworkID}] = true
			i := slices.IndexFunc(v.networks, func(n dockerNetwork) bool { return n.ID == ip.NetworkID })
			vip, err := netip.ParseAddr(withoutBits(ip.Addr))
			if i < 0 || err != nil {
				continue
			}
			vni, err := strconv.ParseUint(v.networks[i].Options[driver.OptVNI], 10, 24)
			key, err2 := hex.DecodeString(v.networks[i].Options[driver.OptKey])
			if err != nil || err2 != nil {
				continue
			}
			n := store.Network{VNI: store.VNI(vni), Key: key}
			all := backends[at{s.ID, ip.NetworkID}]
			slices.SortFunc(all, netip.Addr.Compare)
			out = append(out, store.Service{VNI: n.VNI, VIP: vip, Name: s.Spec.Name, Backends: all,
				Index: max(s.Version.Index, index[s.ID]), Proof: n.Proof(self)})
		}
	}
	return out
}

func older(a, b dockerService) int {
	return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
}

// answered returns the virtual addresses of which hosts are told.
func answered(tx *store.Tx) (out []netip.Addr, err error) {
	all, err := tx.AllServices()
	for _, s := range all {
		out = append(out, s.VIP)
	}
	return out, err
}
