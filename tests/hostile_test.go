package tests

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/tests/hosts"
)

// segment is a kind of network that a container attacks.
type segment struct {
	name   string
	second int // of the subnet
	args   []string
	share  int       // one frame of so many
	next   store.MAC // of the host, where that is the neighbour of all
	bridge bool      // Docker's, for a measure
	open   bool      // its guard is off
}

var routerMAC = store.MAC{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// segments: the first has no guard while those after it have.
var segments = []segment{
	{name: "open", second: 96, share: 50, args: []string{"-o", "guard=false"}, open: true},
	{name: "vxlan", second: 97, share: 2},
	{name: "routed", second: 98, share: 4, args: []string{"-o", "mode=routed"}, next: routerMAC},
	{name: "encrypted", second: 99, share: 4, args: []string{"-o", "encrypted"}, next: routerMAC},
	{name: "plain", second: 95, share: 1, bridge: true},
}

// hostileSeed is of the frames' random parts.
const hostileSeed = 5

// TestHostile has a container with NET_ADMIN and NET_RAW that sends what it may not, to
// others on its network, on both hosts, beside Docker's bridge.
func TestHostile(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		if name != "debian" && !soak() {
			continue // a container's frames do not depend on it
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lab := newLab(t, 2, func(_ int, o *hosts.HostOptions) { o.Engine = engine })
			install(t, lab, pluginDir(t, "", "test"), clusterKey)
			x := &hostile{name: name, lab: lab, frames: 100_000}
			if soak() {
				x.frames = 1_000_000
			}
			t.Logf("seed %d", hostileSeed)
			for _, s := range segments {
				t.Run(s.name, func(t *testing.T) { x.attack(t, s) })
			}
			t.Run("without the plugin", x.withoutPlugin)
			figure(t, "hostile frames on "+name, x.sent, "accepted %d, victims and hosts changed %d (target 0); as many on Docker's bridge: %s", x.accepted, x.changed, x.beside)
			for _, h := range lab.Hosts {
				clean(t, h)
			}
		})
	}
}

type hostile struct {
	name           string
	lab            *hosts.Lab
	frames         int
	sent, accepted int // on networks with the guard
	changed        int
	beside         string
	guarded        []scene
}

// scene is a network with the guard, and who is on it.
type scene struct {
	segment
	attacker member
	victims  []member
}

// known are all that may be in the tables of the network's members.
func (s scene) known() []kerneltest.Station {
	all := []kerneltest.Station{s.attacker.Station, {MAC: s.next, IPv4: netip.AddrFrom4([4]byte{10, byte(s.second), 0, 1})}}
	for _, v := range s.victims {
		all = append(all, v.Station)
	}
	return all
}

// attack makes the network, and attacks from one container of it.
func (x *hostile) attack(t *testing.T, s segment) {
	a, b := x.lab.Hosts[0], x.lab.Hosts[1]
	six := []string{"--ipv6", "--subnet", fmt.Sprintf("fd00:%d::/64", s.second)}
	if s.bridge {
		docker(t, a, append(append([]string{"network", "create", "--subnet", fmt.Sprintf("10.%d.0.0/16", s.second)}, six...), s.name)...)
	} else {
		createNetwork(t, x.lab, s.name, s.second, append(append(six, "--gateway", fmt.Sprintf("10.%d.0.1", s.second)), s.args...)...)
	}
	attacker := x.join(t, a, s, "attacker", "--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW")
	victims := []member{x.join(t, a, s, "near")}
	if !s.bridge {
		victims = append(victims, x.join(t, b, s, "far"))
	}
	known := scene{s, attacker, victims}.known()
	for _, v := range victims {
		for _, pair := range [][2]member{{attacker, v}, {v, attacker}} {
			reach(t, pair[0].Container, pair[1].IPv4.String())
			reach(t, pair[0].Container, pair[1].IPv6.String())
		}
	}

	before := x.look(t, victims, known)
	ears := make([]*ear, len(victims))
	for i, v := range victims {
		ears[i] = v.listens(t)
	}
	counted := guardDrops(t, a)
	start := time.Now()
	sent, refused := attacker.sends(t, rand.New(rand.NewPCG(hostileSeed, uint64(s.second))), x.frames/s.share, s.next, victims...)
	t.Logf("%d frames in %s, refused by the container's kernel: %d", x.frames/s.share, time.Since(start).Round(time.Millisecond), refused)
	if !s.bridge && !s.open { // there the victims may believe anything by now
		attacker.talks(t, ears)
	}
	accepted := int64(0)
	for _, e := range ears {
		accepted += e.stop()
		if e.first != "" {
			t.Logf("the first that %s accepts: %s", e.of.Name, e.first)
		}
	}
	changed := changes(t, before, x.look(t, victims, known))
	total := 0
	for _, n := range sent {
		total += n
	}
	said := fmt.Sprintf("accepted %d, changed %d", accepted, changed)
	switch {
	case s.bridge:
		x.beside = said
		if accepted == 0 || changed == 0 {
			t.Errorf("on Docker's bridge %s: the attack does not bite", said)
		}
	case s.open:
		if accepted == 0 {
			t.Error("without the guard nothing is accepted")
		}
		if now := guardDrops(t, a); !cmp.Equal(counted, now) {
			t.Errorf("without the guard frames are dropped: %v, %v", counted, now)
		}
	default:
		x.sent, x.accepted, x.changed = x.sent+total, x.accepted+int(accepted), x.changed+changed
		if accepted != 0 || changed != 0 {
			t.Errorf("%s, want 0 and 0", said)
		}
		accounted(t, a, counted, sent)
		attacker.accused(t, victims[0], sent)
		attacker.changesMAC(t, victims)
		attacker.sendsJumbo(t, victims)
		attacker.sendsFragments(t, s.next, victims)
		x.guarded = append(x.guarded, scene{s, attacker, victims})
	}
	figure(t, "hostile frames, "+s.name+" on "+x.name, total, "%s", said)
}

// join runs a container of the network.
func (x *hostile) join(t *testing.T, h *hosts.Host, s segment, name string, args ...string) member {
	t.Helper()
	six := netip.MustParseAddr(fmt.Sprintf("fd00:%d::%d", s.second, 10+len(name))) // names differ in length
	m := member{Container: run(t, h, s.name+"-"+name, append(args, "--network", s.name, "--ip6", six.String())...)}
	m.IPv4, m.IPv6 = addressOf(t, m.Container, s.name), six
	m.link = interfaceOf(t, m.Container, m.IPv4.String())
	mac, err := net.ParseMAC(command(t, m.Container, "cat", "/sys/class/net/"+m.link+"/address"))
	if err != nil {
		t.Fatal(err)
	}
	m.MAC = store.MAC(mac)
	eventually(t, 10*time.Second, "addresses of "+m.Name+" are not tentative", func(ctx context.Context) error {
		out, err := m.Exec(ctx, "ip", "address")
		if err == nil && strings.Contains(out, "tentative") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	return m
}

// look reads the tables of the victims and hosts, by name.
func (x *hostile) look(t *testing.T, victims []member, known []kerneltest.Station) map[string][]string {
	t.Helper()
	all := lookAt(t, victims, known)
	for _, h := range x.lab.Hosts {
		all["host "+h.Name] = tables(t, h.NetNS(), regexp.MustCompile("^(weft|br-)"), known...)
	}
	return all
}

// lookAt reads the tables of the victims alone, by name.
func lookAt(t *testing.T, victims []member, known []kerneltest.Station) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	for _, v := range victims {
		all[v.Name] = tables(t, netnsOf(t, v.Container), regexp.MustCompile("^"+v.link+"$"), known...)
	}
	return all
}

// changes counts the tables that are not as before.
func changes(t *testing.T, before, now map[string][]string) (n int) {
	t.Helper()
	for name, after := range now {
		if !slices.Equal(before[name], after) {
			n++
			t.Logf("%s changed:\n%s", name, cmp.Diff(before[name], after))
		}
	}
	return n
}

// talks: the ears are open, and the network is too for what may pass.
func (m member) talks(t *testing.T, ears []*ear) {
	t.Helper()
	for _, e := range ears {
		for _, to := range []netip.Addr{e.of.IPv4, e.of.IPv6} {
			heard := e.honest.Load()
			eventually(t, 10*time.Second, m.Name+" is heard at "+to.String(), func(context.Context) error {
				sendText(t, m.Container, to.String(), honest)
				pause(t, 10*time.Millisecond)
				if e.honest.Load() == heard {
					return fmt.Errorf("nothing came")
				}
				return nil
			})
		}
	}
}

// accounted waits until the guard has counted the frames that were sent.
func accounted(t *testing.T, h *hosts.Host, before map[string]int, sent map[string]int) {
	t.Helper()
	eventually(t, 10*time.Second, "the guard counts what it drops", func(context.Context) error {
		now := guardDrops(t, h)
		for reason, n := range sent {
			if got := now[reason] - before[reason]; got < n {
				return fmt.Errorf("%d dropped of %d for the reason %s", got, n, reason)
			}
		}
		return nil
	})
}

// accused: of the endpoints of the host weft endpoints shows who sent what the guard
// dropped, and who did not.
func (m member) accused(t *testing.T, other member, sent map[string]int) {
	t.Helper()
	found := 0
	for _, e := range view[[]endpointView](t, m.Host, "endpoints") {
		switch {
		case e.MAC != m.MAC.String() && e.MAC != other.MAC.String():
			continue
		case e.Program == nil:
			t.Errorf("endpoint %.12s has no counts", e.ID)
		case e.MAC == other.MAC.String() && len(e.Program.Dropped) > 0:
			t.Errorf("the victim on this host is said to have sent %v", e.Program.Dropped)
		case e.MAC == m.MAC.String():
			for reason, n := range sent {
				if got := e.Program.Dropped[reason]; got < n {
					t.Errorf("%d dropped of %d that the attacker sent, for the reason %s", got, n, reason)
				}
			}
		}
		found++
	}
	if found != 2 {
		t.Errorf("weft endpoints shows %d of the attacker and the victim on its host", found)
	}
}

// guardDrops reads from the metrics how many frames the guard has dropped, by reason.
func guardDrops(t *testing.T, h *hosts.Host) map[string]int {
	t.Helper()
	raw, err := ask(t.Context(), h, "weft-admin.sock", http.MethodGet, "/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	drops := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^weft_guard_drops_total\{reason="(.*)"\} (.*)$`).FindAllStringSubmatch(string(raw), -1) {
		n, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		drops[m[1]] = int(n)
	}
	return drops
}

// changesMAC: a container that changes its MAC is silent until it has its own again.
func (m member) changesMAC(t *testing.T, victims []member) {
	t.Helper()
	before := guardDrops(t, m.Host)["mac"]
	command(t, m.Container, "ip", "link", "set", m.link, "address", "02:99:99:99:99:99")
	silent(t, m.Container, victims[0].IPv4.String())
	silent(t, m.Container, victims[1].IPv6.String())
	if now := guardDrops(t, m.Host)["mac"]; now <= before {
		t.Errorf("frames of another MAC are not counted: %d, %d", before, now)
	}
	command(t, m.Container, "ip", "link", "set", m.link, "address", m.MAC.String())
	for _, v := range victims {
		reach(t, m.Container, v.IPv4.String())
		reach(t, m.Container, v.IPv6.String())
	}
}

// sendsJumbo: a container that makes its MTU larger than the network's is heard with what
// fits alone.
func (m member) sendsJumbo(t *testing.T, victims []member) {
	t.Helper()
	mtu := mtuOf(t, m.Container, m.link)
	command(t, m.Container, "ip", "link", "set", m.link, "mtu", "9000")
	for _, v := range victims {
		silent(t, m.Container, v.IPv4.String(), "-s", "8000")
		reach(t, m.Container, v.IPv4.String())
	}
	command(t, m.Container, "ip", "link", "set", m.link, "mtu", strconv.Itoa(mtu))
}

// sendsFragments: what looks as strange as some of the hostile frames and is none passes.
func (m member) sendsFragments(t *testing.T, next store.MAC, victims []member) {
	t.Helper()
	for _, v := range victims {
		e := v.listens(t)
		for _, kind := range []string{"ipv4", "ipv6", "ipv6 behind headers"} {
			before := e.accepted.Load()
			eventually(t, 10*time.Second, v.Name+" gets a frame of kind "+kind, func(context.Context) error {
				m.sendsOne(t, kind, next, v)
				pause(t, 10*time.Millisecond)
				if e.accepted.Load() == before {
					return fmt.Errorf("it does not")
				}
				return nil
			})
		}
		e.stop()
		for _, to := range []netip.Addr{v.IPv4, v.IPv6} {
			eventually(t, 20*time.Second, m.Name+" pings "+to.String()+" in fragments", func(ctx context.Context) error {
				_, err := m.Exec(ctx, "ping", "-c", "1", "-W", "1", "-s", "4000", to.String())
				return err
			})
		}
	}
}
