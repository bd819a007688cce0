package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/weftnet/weft/store"
)

// followEvery is how often weft flows -f looks.
const followEvery = time.Second

func flows(c *cli) func(context.Context, []string) error {
	follow := c.flags.Bool("f", false, "follow: print every second what was sent meanwhile, until interrupted")
	return simple(func(ctx context.Context, c *cli) error {
		if *follow {
			ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return followFlows(ctx, c)
		}
		all, err := ask[[]flowReply](ctx, &c.admin, "/v1/flows")
		if err != nil {
			return err
		}
		c.docker.flowNames(ctx).tell(all)
		if c.print(all) {
			return nil
		}
		rows := [][]string{{"SOURCE", "DESTINATION", "PORT", "VERDICT", "PACKETS", "BYTES", "FIRST", "LAST"}}
		for _, f := range all {
			rows = append(rows, []string{f.Source.text(), f.to(), f.port(), string(f.Verdict), strconv.FormatUint(f.Packets, 10), strconv.FormatUint(f.Bytes, 10),
				f.First.UTC().Format(time.DateTime), f.Last.UTC().Format(time.DateTime)})
		}
		c.table(rows)
		return nil
	})(c)
}

// followFlows prints a line for each flow in which something was sent: with what that
// was, or as JSON with the flow's sums.
func followFlows(ctx context.Context, c *cli) error {
	var before map[string]flowReply
	for {
		all, err := ask[[]flowReply](ctx, &c.admin, "/v1/flows")
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		moved, now := moved(before, all)
		if before != nil && len(moved) > 0 {
			c.docker.flowNames(ctx).tell(moved)
			c.printAllMoved(moved, before)
		}
		before = now
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(followEvery):
		}
	}
}

func (c *cli) printAllMoved(all []flowReply, before map[string]flowReply) {
	for _, f := range all {
		if c.json {
			_ = json.NewEncoder(c.out).Encode(f) // a closed pipe ends the process
			continue
		}
		b := before[f.key()]
		if b.Packets > f.Packets { // it was forgotten, and began anew
			b = flowReply{}
		}
		fmt.Fprintf(c.out, "%s  %s -> %s  %s  %s  %d packets, %d bytes\n", f.Last.UTC().Format(time.TimeOnly), f.Source.text(), f.to(), f.port(), f.Verdict,
			f.Packets-b.Packets, f.Bytes-b.Bytes)
	}
}

// moved returns the flows that have other counts than before, and all by their keys.
func moved(before map[string]flowReply, all []flowReply) (out []flowReply, now map[string]flowReply) {
	now = map[string]flowReply{}
	for _, f := range all {
		now[f.key()] = f
		if before[f.key()].Packets != f.Packets {
			out = append(out, f)
		}
	}
	return out, now
}

// key tells flows apart.
func (f flowReply) key() string {
	return fmt.Sprint(f.VNI, f.Source.Address, f.Source.Endpoint, f.Destination.Address, f.Virtual, f.Protocol, f.Port, f.Verdict)
}

func (f flowReply) port() string {
	if f.Port == 0 {
		return f.Protocol
	}
	return fmt.Sprintf("%s/%d", f.Protocol, f.Port)
}

// to is the destination, with the service that was asked for.
func (f flowReply) to() string {
	if !f.Virtual.IsValid() {
		return cmp.Or(f.VirtualService, f.Destination.text())
	}
	return f.Destination.text() + " via " + cmp.Or(f.VirtualService, f.Virtual.String())
}

func (e flowEnd) text() string {
	name := e.Address.String()
	switch {
	case e.Container != "" && e.Pretends:
		name = e.Container + " as " + name
	case e.Container != "":
		name = e.Container
	}
	if e.Endpoint != "" && !e.Local {
		name += " on " + e.Host
	}
	return name
}

// flowNames is what Docker calls the ends of flows.
type flowNames struct {
	containers      map[store.EndpointID]dockerContainer
	tasks, services map[networkAddress][2]string // task or "", and service
}

type networkAddress struct {
	network store.NetworkID
	address netip.Addr
}

// flowNames asks Docker; names are an ornament, so what it does not tell is missing. It
// tells of other hosts' tasks on a manager.
func (d *dockerClient) flowNames(ctx context.Context) flowNames {
	ctx, cancel := context.WithTimeout(ctx, swarmLimit)
	defer cancel()
	n := flowNames{containers: d.containersByEndpoint(ctx), tasks: map[networkAddress][2]string{}, services: map[networkAddress][2]string{}}
	var all []dockerService
	var tasks []dockerTask
	if d.get(ctx, "/services", &all) != nil || d.get(ctx, "/tasks", &tasks) != nil {
		return n
	}
	add := func(to map[networkAddress][2]string, network, cidr, task, service string) {
		if a, err := netip.ParseAddr(withoutBits(cidr)); err == nil {
			to[networkAddress{store.NetworkID(network), a}] = [2]string{task, service}
		}
	}
	names := map[string]string{}
	for _, s := range all {
		names[s.ID] = s.Spec.Name
		for _, ip := range s.Endpoint.VirtualIPs {
			add(n.services, ip.NetworkID, ip.Addr, "", s.Spec.Name)
		}
	}
	for _, t := range tasks {
		if t.over() || names[t.ServiceID] == "" {
			continue
		}
		task := names[t.ServiceID] // one on each host
		if t.Slot > 0 {
			task += "." + strconv.Itoa(t.Slot)
		}
		for _, a := range t.NetworksAttachments {
			for _, cidr := range a.Addresses {
				add(n.tasks, a.Network.ID, cidr, task, names[t.ServiceID])
			}
		}
	}
	return n
}

// tell puts the names into flows.
func (n flowNames) tell(all []flowReply) {
	for i := range all {
		f := &all[i]
		n.tellEnd(f.Network, &f.Source)
		n.tellEnd(f.Network, &f.Destination)
		f.VirtualService = n.services[networkAddress{f.Network, cmp.Or(f.Virtual, f.Destination.Address)}][1]
	}
}

func (n flowNames) tellEnd(network store.NetworkID, e *flowEnd) {
	if c, ok := n.containers[e.Endpoint]; ok && e.Endpoint != "" && len(c.Names) > 0 {
		e.Labels = c.Labels
		e.Service = cmp.Or(c.Labels["com.docker.swarm.service.name"], c.Labels["com.docker.compose.service"])
		// A task's container is web.1 with the task's id behind.
		e.Container = strings.TrimSuffix(strings.TrimPrefix(c.Names[0], "/"), "."+c.Labels["com.docker.swarm.task.id"])
		return
	}
	if e.Pretends {
		return
	}
	t := n.tasks[networkAddress{network, e.Address}]
	e.Container, e.Service = t[0], t[1]
}
