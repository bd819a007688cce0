package main

import (
	"context"

	api "github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
)

// routes is the table of Docker's calls (moby daemon/libnetwork/docs/remote.md).
// Those that answer at once do not wait for the database: the start of dockerd waits
// for them. Program- and RevokeExternalConnectivity come only to drivers that answer a
// gateway.
func (p *process) routes() []call {
	return []call{
		atOnce("Plugin.Activate", map[string][]string{"Implements": {"NetworkDriver", "IpamDriver"}}),

		call{method: "NetworkDriver.GetCapabilities", noBody: true, serve: func(context.Context, *gate, []byte) (any, error) {
			p.term.begin()
			return driver.GetCapabilities(p.set.scope), nil
		}},
		atOnce("NetworkDriver.GwAllocCheck", driver.GwAllocCheckResponse{}),
		p.swarm.call("NetworkDriver.DiscoverNew", false),
		p.swarm.call("NetworkDriver.DiscoverDelete", true),
		// A failure of this one stops a container's start on Debian's engine.
		atOnce("NetworkDriver.EndpointOperInfo", network.InfoResponse{Value: map[string]string{}}),
		onDriver("NetworkDriver.AllocateNetwork", (*driver.Driver).AllocateNetwork),
		onDriver("NetworkDriver.FreeNetwork", (*driver.Driver).FreeNetwork),
		onDriver("NetworkDriver.CreateNetwork", (*driver.Driver).CreateNetwork),
		onDriver("NetworkDriver.DeleteNetwork", (*driver.Driver).DeleteNetwork),
		onDriver("NetworkDriver.CreateEndpoint", (*driver.Driver).CreateEndpoint),
		onDriver("NetworkDriver.DeleteEndpoint", (*driver.Driver).DeleteEndpoint),
		onDriver("NetworkDriver.Join", (*driver.Driver).Join),
		onDriver("NetworkDriver.Leave", (*driver.Driver).Leave),
		onDriver("NetworkDriver.ProgramExternalConnectivity", (*driver.Driver).ProgramExternalConnectivity),
		onDriver("NetworkDriver.RevokeExternalConnectivity", (*driver.Driver).RevokeExternalConnectivity),

		call{method: "IpamDriver.GetCapabilities", noBody: true, serve: func(context.Context, *gate, []byte) (any, error) {
			p.term.settle()
			return ipam.Capabilities{}, nil
		}},
		atOnce("IpamDriver.GetDefaultAddressSpaces", api.AddressSpacesResponse{
			LocalDefaultAddressSpace: ipam.LocalSpace, GlobalDefaultAddressSpace: ipam.GlobalSpace}),
		onIPAM("IpamDriver.RequestPool", (*ipam.IPAM).RequestPool),
		onIPAM("IpamDriver.ReleasePool", (*ipam.IPAM).ReleasePool),
		onIPAM("IpamDriver.RequestAddress", (*ipam.IPAM).RequestAddress),
		onIPAM("IpamDriver.ReleaseAddress", (*ipam.IPAM).ReleaseAddress),
	}
}

// atOnce answers always the same, whatever the request holds.
func atOnce(method string, reply any) call {
	return call{method: method, noBody: true, serve: func(context.Context, *gate, []byte) (any, error) { return reply, nil }}
}

func onDriver[Req, Resp any](method string, fn func(*driver.Driver, context.Context, Req) (Resp, error)) call {
	return onService(method, func(svc *services, ctx context.Context, r Req) (Resp, error) { return fn(svc.driver, ctx, r) })
}

func onIPAM[Req, Resp any](method string, fn func(*ipam.IPAM, context.Context, Req) (Resp, error)) call {
	return onService(method, func(svc *services, ctx context.Context, r Req) (Resp, error) { return fn(svc.ipam, ctx, r) })
}

// onService decodes the request before it waits, so that a bad one is told even
// while nothing works.
func onService[Req, Resp any](method string, fn func(*services, context.Context, Req) (Resp, error)) call {
	return call{method: method, serve: func(ctx context.Context, g *gate, body []byte) (any, error) {
		req, err := decode[Req](method, body)
		if err != nil {
			return nil, err
		}
		svc, err := g.wait(ctx)
		if err != nil {
			return nil, err
		}
		return fn(svc, ctx, req)
	}}
}
