package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/store"
)

// swarmLimit bounds all that weft status asks Docker together: dockerd answers
// nothing while it starts, and a manager without a leader lets its clients wait.
const swarmLimit = 2 * time.Second

// What Docker's API tells of Swarm, as far as it is looked at.
type (
	dockerInfo struct {
		ServerVersion string
		Swarm         struct {
			NodeID, Error    string
			LocalNodeState   string // "inactive", "pending", "active", "error" or "locked"
			ControlAvailable bool   // a manager
		}
	}
	dockerNode struct {
		ID          string
		Description struct {
			Hostname string
			Engine   struct {
				Plugins []struct{ Type, Name string }
			}
		}
		Status        struct{ State, Addr string }
		ManagerStatus struct{ Leader bool }
	}
	dockerService struct {
		ID        string
		CreatedAt time.Time
		Version   struct{ Index uint64 }
		Spec      struct {
			Name         string
			Labels       map[string]string
			EndpointSpec struct{ Ports []dockerPort }
		}
		Endpoint struct {
			VirtualIPs []struct{ NetworkID, Addr string } // none with dnsrr
		}
	}
	dockerPort struct {
		Protocol                  string
		TargetPort, PublishedPort int // 0: Docker chooses
		PublishMode               string
	}
	dockerTask struct {
		ID, ServiceID       string
		Slot                int // 0: one on each host
		Version             struct{ Index uint64 }
		Status              struct{ State string }
		DesiredState        string
		NetworksAttachments []struct {
			Network   struct{ ID string }
			Addresses []string
		}
	}
)

// swarmView is what Docker and the plugin say of a Swarm.
type swarmView struct {
	plugin   string // Docker's name of it
	status   statusReply
	peers    []peerReply
	info     dockerInfo
	networks []dockerNetwork          // the plugin's of scope swarm
	waiting  []dockerNetwork          // that are not allocated: Docker does not tell whose they are
	ids      map[store.NetworkID]bool // of all networks, as a manager tells
	nodes    []dockerNode             // as a manager tells
	services []dockerService          // the same
	missing  string                   // why not all was looked at
}

// askSwarm looks at Swarm for weft status. What it cannot learn is in missing.
func (c *cli) askSwarm(ctx context.Context, s statusReply) swarmView {
	v := swarmView{plugin: "weft:latest", status: s}
	v.peers, _ = ask[[]peerReply](ctx, &c.admin, "/v1/peers") // status has the plugin's own trouble
	ctx, cancel := context.WithTimeout(ctx, swarmLimit)
	defer cancel()
	switch err := v.ask(ctx, c); {
	case errors.Is(err, context.DeadlineExceeded):
		v.missing = fmt.Sprintf("Docker did not answer within %v", swarmLimit)
	case err != nil:
		v.missing = oneLine(err)
	}
	return v
}

func (v *swarmView) ask(ctx context.Context, c *cli) error {
	defer v.sort()
	if err := c.docker.get(ctx, "/info", &v.info); err != nil {
		return err
	}
	v.plugin = c.docker.pluginName(ctx, c.admin.pluginID())
	if v.info.Swarm.LocalNodeState != "active" {
		return nil
	}
	var all []dockerNetwork
	if err := c.docker.get(ctx, "/networks", &all); err != nil {
		return err
	}
	if v.info.Swarm.ControlAvailable {
		v.ids = map[store.NetworkID]bool{}
	}
	for _, n := range all {
		if v.ids != nil {
			v.ids[store.NetworkID(n.ID)] = true
		}
		switch {
		case n.Scope != "swarm" || n.ConfigOnly:
		case n.Driver == v.plugin:
			v.networks = append(v.networks, n)
		case n.Driver == "":
			v.waiting = append(v.waiting, n)
		}
	}
	if !v.info.Swarm.ControlAvailable {
		return nil
	}
	if err := c.docker.get(ctx, "/nodes", &v.nodes); err != nil {
		return err
	}
	return c.docker.get(ctx, "/services", &v.services)
}

// current leaves out what the plugin says of networks that are gone.
func (v swarmView) current(all []problem) []problem {
	return slices.DeleteFunc(all, func(p problem) bool { return p.Network != "" && v.ids != nil && !v.ids[p.Network] })
}

// sort puts what Docker lists in the order of its ids into that of its names.
func (v *swarmView) sort() {
	slices.SortFunc(v.services, func(a, b dockerService) int { return strings.Compare(a.Spec.Name, b.Spec.Name) })
	slices.SortFunc(v.nodes, func(a, b dockerNode) int { return strings.Compare(a.Description.Hostname, b.Description.Hostname) })
	slices.SortFunc(v.networks, func(a, b dockerNetwork) int { return strings.Compare(a.Name, b.Name) })
}

// text is the line of weft status about Swarm, "" when Docker did not tell.
func (v swarmView) text() string {
	scope := "scope " + orDash(v.status.Scope)
	switch in := v.info.Swarm; {
	case in.LocalNodeState == "":
		return ""
	case in.LocalNodeState != "active":
		return in.LocalNodeState + ", " + scope
	case !in.ControlAvailable:
		return "worker, " + scope
	case v.leader() == in.NodeID:
		return fmt.Sprintf("leader of %d hosts, %s", len(v.nodes), scope)
	}
	return fmt.Sprintf("manager, of %d hosts, %s", len(v.nodes), scope)
}

// leader returns the node's id, "" when it is not known.
func (v swarmView) leader() string {
	for _, n := range v.nodes {
		if n.ManagerStatus.Leader {
			return n.ID
		}
	}
	return ""
}

// swarmUse is what Swarm has taken of our address management.
type swarmUse struct {
	active bool
	leader bool // this host is; the leader alone hands out addresses
	// used are the addresses of services and tasks, on whatever host.
	used map[store.NetworkID]map[netip.Addr]string
}

// swarmUse asks for the addresses that Swarm's leader has taken.
func (d *dockerClient) swarmUse(ctx context.Context) (swarmUse, error) {
	u := swarmUse{used: map[store.NetworkID]map[netip.Addr]string{}}
	var v swarmView
	if err := d.get(ctx, "/info", &v.info); err != nil {
		return u, err
	}
	u.active = v.info.Swarm.LocalNodeState == "active"
	if !u.active || !v.info.Swarm.ControlAvailable {
		return u, nil
	}
	if err := d.get(ctx, "/nodes", &v.nodes); err != nil {
		return u, err
	}
	if u.leader = v.leader() == v.info.Swarm.NodeID; !u.leader {
		return u, nil
	}
	if err := d.get(ctx, "/services", &v.services); err != nil {
		return u, err
	}
	var tasks, attached []dockerTask
	if err := d.get(ctx, "/tasks", &tasks); err != nil {
		return u, err
	}
	// Containers that docker run attached, on whatever host, are listed when asked for.
	if err := d.get(ctx, "/tasks?filters="+url.QueryEscape(`{"runtime":["attachment"]}`), &attached); err != nil {
		return u, err
	}
	for _, s := range v.services {
		for _, ip := range s.Endpoint.VirtualIPs {
			u.add(ip.NetworkID, ip.Addr, "service "+s.Spec.Name)
		}
	}
	for _, t := range append(tasks, attached...) {
		if t.over() {
			continue
		}
		for _, n := range t.NetworksAttachments {
			for _, a := range n.Addresses {
				u.add(n.Network.ID, a, "task "+short(t.ID))
			}
		}
	}
	return u, nil
}

func (u swarmUse) add(network, cidr, who string) {
	addr, err := netip.ParseAddr(withoutBits(cidr))
	if err != nil {
		return
	}
	id := store.NetworkID(network)
	if u.used[id] == nil {
		u.used[id] = map[netip.Addr]string{}
	}
	u.used[id][addr] = who
}

// over reports whether Swarm has freed the task's addresses (swarmkit
// manager/allocator/network.go: taskDead). The task still lists them.
func (t dockerTask) over() bool {
	ended := []string{"complete", "shutdown", "failed", "rejected", "remove", "orphaned"}
	return slices.Contains(ended, t.Status.State) && slices.Contains(ended, t.DesiredState)
}
