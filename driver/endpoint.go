package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/store"
)

// CreateEndpoint records an endpoint and makes its link. The answer holds the MAC
// if Docker gave none.
func (d *Driver) CreateEndpoint(ctx context.Context, r network.CreateEndpointRequest) (network.CreateEndpointResponse, error) {
	var e store.Endpoint
	var made bool
	err := store.AwaitPeers(ctx, func() (err error) {
		e, made, err = d.addEndpoint(ctx, r)
		return err
	})
	if err != nil {
		return network.CreateEndpointResponse{}, fmt.Errorf("create endpoint: %w", err)
	}
	store.FailPoint("driver.CreateEndpoint.written")
	if err := d.Sync.Sync(ctx, e.VNI, e.ID); err != nil {
		if made {
			err = errors.Join(err, d.forget(func(tx *store.Tx) error { return tx.DeleteEndpoint(e.Network, e.ID) }))
		}
		return network.CreateEndpointResponse{}, fmt.Errorf("create endpoint %.12s: %w", e.ID, err)
	}
	store.FailPoint("driver.CreateEndpoint.synced")
	return endpointReply(e), nil
}

func (d *Driver) addEndpoint(ctx context.Context, r network.CreateEndpointRequest) (e store.Endpoint, made bool, err error) {
	if err := errors.Join(checkID("NetworkID", r.NetworkID), checkID("EndpointID", r.EndpointID), d.refuse()); err != nil {
		return e, false, err
	}
	store.FailPoint("driver.CreateEndpoint.before")
	err = d.DB.Update(ctx, func(tx *store.Tx) error {
		n, err := tx.Network(store.NetworkID(r.NetworkID))
		if err != nil {
			return unknownNetwork(r.NetworkID, err)
		}
		if e, err = parseEndpoint(r, n); err != nil {
			return err
		}
		old, err := tx.Endpoint(n.ID, e.ID)
		if err == nil {
			if old.IPv4 != e.IPv4 || old.IPv6 != e.IPv6 || old.MAC != e.MAC {
				return fmt.Errorf("endpoint %s exists with %s %s %s, not %s %s %s; delete it first",
					e.ID, old.IPv4, old.IPv6, old.MAC, e.IPv4, e.IPv6, e.MAC)
			}
			e = old
			if old.Left {
				e.Left = false
				e, err = tx.PutEndpoint(e)
			}
			return err
		}
		if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err := checkUnique(tx, n, e); err != nil {
			return err
		}
		e.Created, made = time.Now().UTC(), true
		e, err = tx.PutEndpoint(e)
		return err
	})
	return e, made, err
}

// unknownNetwork says what to do about a network that this host does not have: a
// plugin that was removed has lost it, and Docker will not tell it again.
func unknownNetwork(id string, err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("network %.12s is not known to Weft on this host; remove it with docker network rm and create it again", id)
	}
	return err
}

// checkUnique refuses an address or MAC that another endpoint of the network has,
// here or on a peer.
func checkUnique(tx *store.Tx, n store.Network, e store.Endpoint) error {
	local, err := tx.Endpoints(n.ID)
	if err != nil {
		return err
	}
	for _, o := range local {
		switch {
		case o.Left:
		case e.IPv4.IsValid() && o.IPv4.Addr() == e.IPv4.Addr(), e.IPv6.IsValid() && o.IPv6.Addr() == e.IPv6.Addr():
			return fmt.Errorf("address %s %s belongs to endpoint %.12s on this host", e.IPv4, e.IPv6, o.ID)
		case o.MAC == e.MAC:
			return fmt.Errorf("MAC address %s belongs to endpoint %.12s on this host; choose another --mac-address", e.MAC, o.ID)
		}
	}
	remote, err := tx.RemoteEndpoints(n.VNI)
	if err != nil {
		return err
	}
	for _, o := range remote {
		p, err := tx.Peer(o.Owner)
		if err != nil || p.Hidden {
			continue // a host that is gone may not keep an address for ever
		}
		switch {
		case e.IPv4.IsValid() && o.IPv4 == e.IPv4.Addr():
			return &store.ElsewhereError{Reason: fmt.Sprintf("address %s lives on host %s; choose another, or give each host its own --ip-range", o.IPv4, hostName(tx, o.Owner))}
		case e.IPv6.IsValid() && o.IPv6 == e.IPv6.Addr():
			return &store.ElsewhereError{Reason: fmt.Sprintf("address %s lives on host %s; choose another, or give each host its own --ip-range", o.IPv6, hostName(tx, o.Owner))}
		case o.MAC == e.MAC:
			return &store.ElsewhereError{Reason: fmt.Sprintf("MAC address %s lives on host %s; choose another --mac-address", e.MAC, hostName(tx, o.Owner))}
		}
	}
	return nil
}

// Join hands the container's side of the link to Docker.
func (d *Driver) Join(ctx context.Context, r network.JoinRequest) (JoinResponse, error) {
	if r.SandboxKey == "" {
		return JoinResponse{}, errors.New("join: SandboxKey is empty")
	}
	store.FailPoint("driver.Join.before")
	n, e, err := d.readEndpoint(r.NetworkID, r.EndpointID)
	if err != nil {
		return JoinResponse{}, fmt.Errorf("join: %w", err)
	}
	if e.Sandbox != "" && e.Sandbox != r.SandboxKey {
		return JoinResponse{}, fmt.Errorf("join: endpoint %.12s is in sandbox %s, not %s; leave that first", e.ID, e.Sandbox, r.SandboxKey)
	}
	if e.Left { // the link went when it left: make it anew before it is handed over
		e.Left = false
		if err := d.putEndpoint(ctx, &e); err != nil {
			return JoinResponse{}, fmt.Errorf("join endpoint %.12s: %w", e.ID, err)
		}
		if err := d.Sync.Sync(ctx, e.VNI, e.ID); err != nil {
			return JoinResponse{}, fmt.Errorf("join endpoint %.12s: %w", e.ID, err)
		}
	}
	if e.Sandbox == "" {
		e.Sandbox = r.SandboxKey
		if err := d.putEndpoint(ctx, &e); err != nil {
			return JoinResponse{}, fmt.Errorf("join endpoint %.12s: %w", e.ID, err)
		}
	}
	store.FailPoint("driver.Join.written")
	if err := d.Sync.Sync(ctx, e.VNI, e.ID); err != nil {
		return JoinResponse{}, fmt.Errorf("join endpoint %.12s: %w", e.ID, err)
	}
	store.FailPoint("driver.Join.synced")
	return joinReply(n, e), nil
}

func (d *Driver) readEndpoint(network, endpoint string) (n store.Network, e store.Endpoint, err error) {
	err = d.DB.View(func(tx *store.Tx) error {
		if n, err = tx.Network(store.NetworkID(network)); err != nil {
			return unknownNetwork(network, err)
		}
		e, err = tx.Endpoint(n.ID, store.EndpointID(endpoint))
		return err
	})
	return n, e, err
}

func (d *Driver) putEndpoint(ctx context.Context, e *store.Endpoint) error {
	return d.DB.Update(ctx, func(tx *store.Tx) (err error) {
		if _, err := tx.Endpoint(e.Network, e.ID); err != nil {
			return err // deleted meanwhile
		}
		*e, err = tx.PutEndpoint(*e)
		return err
	})
}

// Leave takes the link away. An endpoint that is unknown or has left is no error.
func (d *Driver) Leave(ctx context.Context, r network.LeaveRequest) (struct{}, error) {
	store.FailPoint("driver.Leave.before")
	err := d.DB.Update(ctx, func(tx *store.Tx) error {
		e, err := tx.Endpoint(store.NetworkID(r.NetworkID), store.EndpointID(r.EndpointID))
		if errors.Is(err, store.ErrNotFound) || err == nil && e.Left {
			return nil
		}
		if err != nil {
			return err
		}
		e.Sandbox, e.Left, e.Ports = "", true, nil
		_, err = tx.PutEndpoint(e)
		return err
	})
	d.release(store.EndpointID(r.EndpointID))
	store.FailPoint("driver.Leave.written")
	return struct{}{}, err
}

// DeleteEndpoint removes an endpoint. An unknown one is no error.
func (d *Driver) DeleteEndpoint(ctx context.Context, r network.DeleteEndpointRequest) (struct{}, error) {
	store.FailPoint("driver.DeleteEndpoint.before")
	err := d.DB.Update(ctx, func(tx *store.Tx) error {
		return tx.DeleteEndpoint(store.NetworkID(r.NetworkID), store.EndpointID(r.EndpointID))
	})
	d.release(store.EndpointID(r.EndpointID))
	store.FailPoint("driver.DeleteEndpoint.written")
	return struct{}{}, err
}

// AbandonEndpoint removes an endpoint whose CreateEndpoint a crash cut off: Docker
// has forgotten it. One that is joined stays: the call repeated what was there.
func (d *Driver) AbandonEndpoint(ctx context.Context, network, endpoint string) error {
	return d.DB.Update(ctx, func(tx *store.Tx) error {
		e, err := tx.Endpoint(store.NetworkID(network), store.EndpointID(endpoint))
		if errors.Is(err, store.ErrNotFound) || err == nil && e.Sandbox != "" {
			return nil
		}
		if err != nil {
			return err
		}
		return tx.DeleteEndpoint(e.Network, e.ID)
	})
}

// FailPoints lists the steps at which a test build can be killed in this package.
func FailPoints() []string {
	return []string{
		"driver.CreateNetwork.checked", "driver.CreateNetwork.written", "driver.CreateNetwork.synced",
		"driver.CreateEndpoint.before", "driver.CreateEndpoint.written", "driver.CreateEndpoint.synced",
		"driver.Join.before", "driver.Join.written", "driver.Join.synced",
		"driver.Leave.before", "driver.Leave.written",
		"driver.Program.before", "driver.Program.written",
		"driver.DeleteEndpoint.before", "driver.DeleteEndpoint.written",
		"driver.DeleteNetwork.before", "driver.DeleteNetwork.written",
	}
}
