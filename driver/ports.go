package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/store"
)

// Ports are chosen from these when the user leaves it open, as Linux does for
// connections (net.ipv4.ip_local_port_range by default).
const (
	firstPort = 32768
	lastPort  = 60999
)

const keyPortMap = "com.docker.network.portmap"

// protocols by their numbers in Docker's requests (IANA).
var protocols = map[uint8]string{6: "tcp", 17: "udp", 132: "sctp"}

// binding is one element of Docker's port map (libnetwork's types.PortBinding).
type binding struct {
	Proto                       uint8
	Port, HostPort, HostPortEnd uint16
	HostIP                      string
}

// ask is a port to publish on a port of a range, or with first 0 on any.
type ask struct {
	store.Port
	first, last uint16
}

// parsePorts reads the port map of a request.
func parsePorts(options map[string]any) ([]ask, error) {
	raw, err := json.Marshal(options[keyPortMap])
	if err != nil {
		return nil, fmt.Errorf("Options: %s: %w", keyPortMap, err)
	}
	var list []binding
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("Options: %s is not a list of ports", keyPortMap)
	}
	var out []ask
	for _, b := range list {
		a := ask{Port: store.Port{Proto: protocols[b.Proto], Port: b.Port}, first: b.HostPort, last: max(b.HostPort, b.HostPortEnd)}
		switch {
		case a.Proto == "":
			return nil, fmt.Errorf("port %d: protocol %d cannot be published; use tcp, udp or sctp", b.Port, b.Proto)
		case b.Port == 0:
			return nil, errors.New("port 0 of a container cannot be published")
		}
		if b.HostIP != "" {
			if a.HostIP, err = netip.ParseAddr(b.HostIP); err != nil {
				return nil, fmt.Errorf("host address %s of port %d is no address", clip(b.HostIP), b.Port)
			}
			a.HostIP = a.HostIP.Unmap()
		}
		if a.Proto == "sctp" && a.HostIP == netip.IPv6Loopback() { // rules do not lead there, and SCTP is not relayed
			return nil, fmt.Errorf("SCTP port %d cannot be published on ::1; use another address of the host", b.Port)
		}
		out = append(out, a)
	}
	return out, nil
}

// ProgramExternalConnectivity publishes an endpoint's ports. A port that another
// endpoint or a process of this host has is refused before anything changes.
func (d *Driver) ProgramExternalConnectivity(ctx context.Context, r network.ProgramExternalConnectivityRequest) (struct{}, error) {
	asks, err := parsePorts(r.Options)
	if err != nil {
		return struct{}{}, fmt.Errorf("publish ports: %w", err)
	}
	n, e, err := d.readEndpoint(r.NetworkID, r.EndpointID)
	if err != nil {
		return struct{}{}, fmt.Errorf("publish ports: %w", err)
	}
	if !n.OwnGateway() || len(asks) == 0 {
		return struct{}{}, nil
	}
	store.FailPoint("driver.Program.before")
	d.release(e.ID)
	err = d.DB.Update(ctx, func(tx *store.Tx) error {
		all, err := tx.AllEndpoints()
		if err != nil {
			return err
		}
		if e, err = tx.Endpoint(n.ID, e.ID); err != nil {
			return err // deleted meanwhile
		}
		others := slices.DeleteFunc(all, func(o store.Endpoint) bool { return o.ID == e.ID })
		if e.Ports, err = d.choosePorts(e, asks, others); err != nil {
			return err
		}
		e, err = tx.PutEndpoint(e)
		return err
	})
	if err == nil {
		store.FailPoint("driver.Program.written")
		err = d.Sync.Sync(ctx, store.HostVNI, "")
	}
	if err == nil {
		err = d.Sync.Sync(ctx, e.VNI, e.ID)
	}
	if err != nil {
		d.release(e.ID)
		return struct{}{}, fmt.Errorf("publish ports of endpoint %.12s: %w", e.ID, errors.Join(err, d.unpublish(context.WithoutCancel(ctx), r.NetworkID, r.EndpointID)))
	}
	return struct{}{}, nil
}

// RevokeExternalConnectivity takes the ports back. An unknown endpoint is no error.
func (d *Driver) RevokeExternalConnectivity(ctx context.Context, r network.RevokeExternalConnectivityRequest) (struct{}, error) {
	err := d.unpublish(ctx, r.NetworkID, r.EndpointID)
	d.release(store.EndpointID(r.EndpointID))
	return struct{}{}, err
}

func (d *Driver) unpublish(ctx context.Context, network, endpoint string) error {
	return d.DB.Update(ctx, func(tx *store.Tx) error {
		e, err := tx.Endpoint(store.NetworkID(network), store.EndpointID(endpoint))
		if errors.Is(err, store.ErrNotFound) || err == nil && len(e.Ports) == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		e.Ports = nil
		_, err = tx.PutEndpoint(e)
		return err
	})
}

// choosePorts returns the ports to publish, and holds them. An endpoint that had some
// keeps those that still fit.
func (d *Driver) choosePorts(e store.Endpoint, asks []ask, others []store.Endpoint) (out []store.Port, err error) {
	defer func() {
		if err != nil {
			d.release(e.ID)
		}
	}()
	for _, a := range asks {
		if a.HostIP.IsValid() && (a.HostIP.Is4() && !e.IPv4.IsValid() || a.HostIP.Is6() && !e.IPv6.IsValid()) {
			if a.HostIP.IsUnspecified() { // as Docker has it: 0.0.0.0 and [::] are often given together
				d.Log.Warn("port is not published: the endpoint has no address of that family", "endpoint", e.ID, "port", a.Port.Port, "on", a.HostIP)
				continue
			}
			return nil, fmt.Errorf("port %d cannot be published on %s: the endpoint has no address of that family", a.Port.Port, a.HostIP)
		}
		p, err := d.choosePort(e, a, others, out)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func (d *Driver) choosePort(e store.Endpoint, a ask, others []store.Endpoint, chosen []store.Port) (store.Port, error) {
	var first error
	for _, number := range a.candidates(e) {
		p := a.Port
		p.HostPort = number
		err := portTaken(p, others, chosen)
		if err == nil {
			err = d.hold(e, p)
		}
		if err == nil {
			return p, nil
		}
		if first == nil {
			first = err
		}
	}
	return a.Port, first
}

// candidates are the host's ports to try in order: the one the endpoint had, those of
// the range, or a hundred any.
func (a ask) candidates(e store.Endpoint) (out []uint16) {
	for _, had := range e.Ports {
		if had.Proto == a.Proto && had.Port == a.Port.Port && had.HostIP == a.HostIP && (a.first == 0 || had.HostPort >= a.first && had.HostPort <= a.last) {
			out = append(out, had.HostPort)
		}
	}
	if a.first == 0 {
		for range 100 {
			out = append(out, firstPort+rand.N[uint16](lastPort-firstPort+1))
		}
		return out
	}
	for n := int(a.first); n <= int(a.last); n++ {
		out = append(out, uint16(n))
	}
	return out
}

// portTaken says who has a port already, in Docker's words.
func portTaken(p store.Port, others []store.Endpoint, chosen []store.Port) error {
	for _, o := range others {
		if slices.ContainsFunc(o.Ports, p.Overlaps) {
			return fmt.Errorf("Bind for %s failed: port is already allocated (endpoint %.12s has it)", bindText(p), o.ID)
		}
	}
	if slices.ContainsFunc(chosen, p.Overlaps) {
		return fmt.Errorf("Bind for %s failed: port is already allocated (the endpoint asks for it twice)", bindText(p))
	}
	return nil
}

func bindText(p store.Port) string {
	host := p.HostIP
	if !host.IsValid() {
		host = netip.IPv4Unspecified()
	}
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(host, p.HostPort), p.Proto)
}

// hold binds the port on the host, so that no process takes it and no other container
// is given it meanwhile.
func (d *Driver) hold(e store.Endpoint, p store.Port) error {
	if d.Hold == nil {
		return nil
	}
	hosts := []netip.Addr{p.HostIP}
	if !p.HostIP.IsValid() {
		hosts = nil
		if e.IPv4.IsValid() {
			hosts = append(hosts, netip.IPv4Unspecified())
		}
		if e.IPv6.IsValid() {
			hosts = append(hosts, netip.IPv6Unspecified())
		}
	}
	var held []io.Closer
	for _, h := range hosts {
		to := e.IPv4.Addr()
		if h.Is6() {
			to = e.IPv6.Addr()
		}
		c, err := d.Hold(p.Proto, netip.AddrPortFrom(h, p.HostPort), netip.AddrPortFrom(to, p.Port))
		if err != nil {
			for _, c := range held {
				_ = c.Close()
			}
			return fmt.Errorf("Bind for %s failed: %w", bindText(p), err)
		}
		held = append(held, c)
	}
	d.heldMu.Lock()
	defer d.heldMu.Unlock()
	if d.held == nil {
		d.held = map[store.EndpointID][]io.Closer{}
	}
	d.held[e.ID] = append(d.held[e.ID], held...)
	return nil
}

// release gives the ports of an endpoint back to the host.
func (d *Driver) release(id store.EndpointID) {
	d.heldMu.Lock()
	defer d.heldMu.Unlock()
	for _, c := range d.held[id] {
		_ = c.Close()
	}
	delete(d.held, id)
}

// HoldPorts binds what is published, after a start. What another process has taken
// meanwhile is logged: the rules go before it.
func (d *Driver) HoldPorts() error {
	return d.DB.View(func(tx *store.Tx) error {
		all, err := tx.AllEndpoints()
		for _, e := range all {
			for _, p := range e.Ports {
				if err := d.hold(e, p); err != nil {
					d.Log.Warn("a published port cannot be kept from other processes", "endpoint", e.ID, "port", p.String(), "err", err)
				}
			}
		}
		return err
	})
}
