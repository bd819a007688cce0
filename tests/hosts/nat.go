package hosts

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// weftPort is the first of the ports that Weft uses by default; the next host behind a
// NAT has natStep more.
const (
	weftPort = 4796
	natStep  = 10
)

// Router does NAT: it has the public address on the cable, hides behind it all that its
// hosts send, and forwards to each the ports that are that host's. What comes from inside
// for the public address it does not turn round, as many do not. All that do NAT have the
// same addresses inside, as those of homes often have. A plain one (HostOptions.Router)
// forwards everything as it is.
type Router struct {
	Name   string
	Public netip.Addr

	plain  bool
	inside netip.Prefix // of its hosts' cable, with its own address there
	hosts  int
	lab    *Lab
	netns  string
}

// Router returns the router of that name, or nil.
func (l *Lab) Router(name string) *Router {
	for _, r := range l.routers {
		if r.Name == name {
			return r
		}
	}
	return nil
}

// The subnets behind routers: with NAT, and without, of which a lab can have one.
var (
	natInside   = netip.MustParsePrefix("192.168.1.1/24")
	plainInside = netip.MustParsePrefix("198.51.100.1/24")
)

// putBehind gives a host its place behind a router, a NAT or a plain one, which is made
// for the first one and takes its public address.
func (l *Lab) putBehind(ctx context.Context, h *Host, nat, plain string) error {
	name, inside := nat, natInside
	if plain != "" {
		name, inside = plain, plainInside
	}
	r := l.Router(name)
	if r == nil {
		r = &Router{Name: name, Public: h.Address, plain: plain != "", inside: inside, lab: l, netns: l.Name + "-nat-" + name}
		l.routers = append(l.routers, r)
		if err := r.start(ctx); err != nil {
			return fmt.Errorf("router %s: %w", name, err)
		}
	}
	address := r.inside.Addr()
	for range r.hosts + 1 {
		address = address.Next()
	}
	h.router, h.Address = r, address
	if !r.plain {
		h.Public, h.Port = r.Public, uint16(weftPort+natStep*r.hosts)
	}
	r.hosts++
	return nil
}

// start makes the router, with a bridge for its hosts.
func (r *Router) start(ctx context.Context) error {
	mtu := strconv.Itoa(r.lab.Underlay.MTU)
	if _, err := run(ctx, nil, "ip", "netns", "add", r.netns); err != nil {
		return err
	}
	if err := r.lab.Underlay.script(ctx, `
link add h-`+r.Name+` mtu `+mtu+` type veth peer name outer mtu `+mtu+` netns `+r.netns+`
link set h-`+r.Name+` master `+mainBridge+` up
`); err != nil {
		return err
	}
	if err := ipBatch(ctx, r.netns, `
link set lo up
link add inner type bridge
link set inner up
address add `+r.inside.String()+` dev inner
address add `+r.Public.String()+`/24 dev outer
link set outer up
route add default via 192.0.2.1
`); err != nil {
		return err
	}
	if _, err := r.Exec(ctx, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"); err != nil {
		return err
	}
	if r.plain {
		return nil
	}
	return r.iptables(ctx, "-t nat -A POSTROUTING -o outer -j MASQUERADE")
}

// connect plugs a host in, and forwards its ports to it where it does NAT.
func (r *Router) connect(ctx context.Context, h *Host) error {
	mtu := strconv.Itoa(r.lab.Underlay.MTU)
	if err := ipBatch(ctx, r.netns, `
link add h-`+h.Name+` mtu `+mtu+` type veth peer name eth0 mtu `+mtu+` netns `+h.netns+`
link set h-`+h.Name+` master inner up
`); err != nil {
		return err
	}
	if err := ipBatch(ctx, h.netns, `
link set lo up
address add `+h.Address.String()+`/24 dev eth0
link set eth0 up
route add default via `+r.inside.Addr().String()+`
`); err != nil {
		return err
	}
	if r.plain {
		return nil
	}
	for _, ports := range []string{
		fmt.Sprintf("udp --dport %d", h.Port), fmt.Sprintf("tcp --dport %d:%d", h.Port, h.Port+1), fmt.Sprintf("udp --dport %d:%d", h.Port+2, h.Port+3),
	} {
		if err := r.iptables(ctx, "-t nat -A PREROUTING -i outer -d "+r.Public.String()+" -p "+ports+" -j DNAT --to-destination "+h.Address.String()); err != nil {
			return err
		}
	}
	return nil
}

func (r *Router) iptables(ctx context.Context, rule string) error {
	_, err := r.Exec(ctx, append([]string{"iptables", "-w"}, strings.Fields(rule)...)...)
	return err
}

// Exec runs a command on the router and returns its output.
func (r *Router) Exec(ctx context.Context, args ...string) (string, error) {
	return run(ctx, nil, "ip", append([]string{"netns", "exec", r.netns}, args...)...)
}

// Capture records the packets of a host on the cable behind the router.
func (r *Router) Capture(ctx context.Context, h *Host, filter string) (*Capture, error) {
	return capture(ctx, r.lab.Dir, r.netns, "h-"+h.Name, filter)
}
