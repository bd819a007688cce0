package tests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestSwarmInput gives a Swarm of a manager and two workers what it must refuse, and
// hosts that are not who they seem, or not where they were.
func TestSwarmInput(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		if name != "newest" && !soak() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &swarmInput{swarm: newSwarm(t, engine, false, "WEFT_SCOPE=global")}
			s.a, s.b, s.c = s.lab.Hosts[0], s.lab.Hosts[1], s.lab.Hosts[2]
			demote(t, s.a, s.b)
			demote(t, s.a, s.c)
			t.Run("options", s.options)
			t.Run("numbers", s.numbers)
			t.Run("route", s.route)
			t.Run("stranger", s.stranger)
			t.Run("renumbered", s.renumbered)
			t.Run("copied", s.copied)
			t.Run("nothing left", s.nothingLeft)
		})
	}
}

// swarmInput is a Swarm of which a is the only manager.
type swarmInput struct {
	*swarm
	a, b, c *hosts.Host
}

// socketOf is the plugin's own socket on a host.
func socketOf(t *testing.T, h *hosts.Host) *socketTest {
	t.Helper()
	pid, err := h.PluginParent(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return &socketTest{host: h, dir: fmt.Sprintf("/proc/%d/root/run/docker/plugins/", pid)}
}

// localNetwork is what Docker would send for a network of one host.
func localNetwork(subnet string, options ...string) string {
	generic := map[string]string{}
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		generic[key] = value
	}
	raw, _ := json.Marshal(object{"NetworkID": strings.Repeat("feed", 16), "IPv4Data": []object{{"Pool": subnet}},
		"Options": object{"com.docker.network.generic": generic}})
	return string(raw)
}

// allocated returns the options that the leader has answered for a network.
func (s *swarmInput) allocated(t *testing.T, name string) map[string]string {
	t.Helper()
	var options map[string]string
	eventually(t, 20*time.Second, "network "+name+" is allocated", func(ctx context.Context) error {
		out, err := s.a.Docker(ctx, "network", "inspect", "--format", "{{json .Options}}", name)
		options = nil
		if err == nil {
			err = json.Unmarshal([]byte(out), &options)
		}
		if err == nil && options["weft.key"] == "" {
			err = fmt.Errorf("its options are %v", options)
		}
		return err
	})
	return options
}

// options gives a manager options that are wrong, and asks it again about a network
// with others than before.
func (s *swarmInput) options(t *testing.T) {
	plugin := socketOf(t, s.a)
	wrong := []string{"mtu=abc", "nonsense=1", "vni=0", "vni=1,2", "mode=bgp", "mtuu=1400"}
	for _, o := range wrong {
		_, alone := plugin.send(t, http.MethodPost, "NetworkDriver.CreateNetwork", strings.NewReader(localNetwork("10.80.0.0/16", o)))
		reason, refused := strings.CutPrefix(alone, "create network: ")
		if !refused {
			t.Fatalf("%s goes through on one host: %q", o, alone)
		}
		s.network(t, "wrong", 80, "-o", o)
		says(t, s.a, []string{"is not allocated, and its tasks wait: " + reason})
		s.removeNetworks(t, "wrong")
	}

	s.network(t, "kept", 81, "-o", "mtu=1400")
	former := s.allocated(t, "kept")
	id := docker(t, s.a, "network", "inspect", "--format", "{{.Id}}", "kept")
	ask := func(subnet string, changed ...string) (answer map[string]string, refusal string) {
		t.Helper()
		options := maps.Clone(former)
		for _, o := range changed {
			key, value, _ := strings.Cut(o, "=")
			if options[key] = value; value == "" {
				delete(options, key)
			}
		}
		raw, err := askAt(t.Context(), plugin.dir+"weft.sock", http.MethodPost, "/NetworkDriver.AllocateNetwork",
			object{"NetworkID": id, "Options": options, "IPv4Data": []object{{"AddressSpace": "", "Pool": subnet}}})
		if err != nil {
			t.Fatal(err)
		}
		var said struct {
			Options map[string]string
			Err     string
		}
		if err := json.Unmarshal(raw, &said); err != nil {
			t.Fatal(err)
		}
		return said.Options, said.Err
	}
	says(t, s.a, nil) // those that were removed are not told any more
	before := plugin.records(t)
	rows := []struct{ subnet, change, want string }{
		{"10.81.0.0/16", "mtu=1300", "1300"}, {"10.81.0.0/16", "mtu=", "1400"}, {"10.81.0.0/16", "ifname=net", "ifname"},
		{"10.81.0.0/16", "weft.vni=4999", "4999"}, {"10.82.0.0/16", "mtu=1400", "10.82.0.0/16"}, {"10.81.0.0/16", "weft.key=00", "key"},
	}
	for _, r := range rows {
		for _, lost := range [][]string{{r.change}, {"weft.vni=", "weft.key=", r.change}} { // with and without the former answer
			if _, refusal := ask(r.subnet, lost...); !strings.Contains(refusal, r.want) {
				t.Errorf("allocated again on %s with %q: %q, want a refusal with %q", r.subnet, lost, refusal, r.want)
			}
			if again, refusal := ask("10.81.0.0/16"); refusal != "" || !maps.Equal(again, former) {
				t.Errorf("then with the former answer: %v %s, want %v", withoutKey(again), refusal, withoutKey(former))
			}
		}
	}
	if again, refusal := ask("10.81.0.0/16", "weft.vni=", "weft.key=", "weft.meet="); refusal != "" || !maps.Equal(again, former) {
		t.Errorf("the former answer was lost: %v %s, want %v", withoutKey(again), refusal, withoutKey(former))
	}
	if now := plugin.records(t); now != before || !maps.Equal(s.allocated(t, "kept"), former) {
		t.Errorf("the records changed:\n%s", difference(before, now))
	}
	says(t, s.a, nil)
	s.removeNetworks(t, "kept")
	figure(t, "swarm: wrong and changed options on "+s.name, len(wrong)+2*len(rows), "refused with the words of a host alone; changed: 0")
}

// withoutKey is what may be printed.
func withoutKey(options map[string]string) map[string]string {
	out := maps.Clone(options)
	delete(out, "weft.key")
	return out
}

// numbers asks for a VNI that another network of the Swarm has, or one that is on a
// single host, and then frees it.
func (s *swarmInput) numbers(t *testing.T) {
	idOf := func(name string) string { return docker(t, s.a, "network", "inspect", "--format", "{{.Id}}", name) }
	waits := func(name string) {
		t.Helper()
		says(t, s.a, []string{"is not allocated"})
		s.createService(t, s.a, "waits", "--network", name)
		s.service(t, "starts", 1, "--network", "one") // as the other would, were it not refused
		if options := docker(t, s.a, "network", "inspect", "--format", "{{json .Options}}", name); strings.Contains(options, "weft.key") {
			t.Errorf("network %s has options %s", name, options)
		}
		tasks := s.listed(t, "waits")
		for _, task := range tasks {
			if task.State != "new" || task.Host != "" || task.Container != "" {
				t.Errorf("a task on a network that was refused does not wait: %+v", task)
			}
		}
		if len(tasks) != 1 {
			t.Errorf("%d tasks wait on a network that was refused, want 1", len(tasks))
		}
		s.removeServices(t, "waits", "starts")
	}
	s.network(t, "one", 83, "-o", "vni=7500")
	s.allocated(t, "one")
	s.network(t, "two", 84, "-o", "vni=7500")
	tells(t, s.a, idOf("two")[:12], "vni 7500 belongs to Swarm network "+idOf("one")[:12])
	waits("two")

	plugin := socketOf(t, s.c)
	local := strings.NewReader(localNetwork("10.85.0.0/16", "vni=7501"))
	if _, refusal := plugin.send(t, http.MethodPost, "NetworkDriver.CreateNetwork", local); refusal != "" {
		t.Fatal(refusal)
	}
	s.removeNetworks(t, "two")
	eventually(t, 20*time.Second, "host a knows vni 7501 of host c", func(context.Context) error { return runs(t, s.a, "c", 7501) })
	s.network(t, "three", 86, "-o", "vni=7501")
	tells(t, s.a, idOf("three")[:12], "vni 7501 is a network with subnets [10.85.0.0/16] on host c")
	waits("three")

	// What the remedy says.
	plugin.send(t, http.MethodPost, "NetworkDriver.DeleteNetwork", strings.NewReader(localNetwork("")))
	s.removeNetworks(t, "one", "three")
	s.forgotten(t)
	eventually(t, 20*time.Second, "host a knows no vni 7501 of host c", func(context.Context) error {
		if runs(t, s.a, "c", 7501) == nil {
			return errors.New("it does")
		}
		return nil
	})
	for name, o := range map[string]string{"two": "vni=7500", "three": "vni=7501"} {
		s.network(t, name, map[string]int{"two": 84, "three": 86}[name], "-o", o)
		if got := s.allocated(t, name)["weft.vni"]; "vni="+got != o {
			t.Errorf("network %s got vni %s, asked for %s", name, got, o)
		}
	}
	says(t, s.a, nil)
	s.removeNetworks(t, "two", "three")
	figure(t, "swarm: a VNI in use on "+s.name, 2, "refused with its holder, by another network of the Swarm and by one of a single host; given once it is free")
}

// runs reports an error unless a host knows that a peer runs the VNI.
func runs(t *testing.T, h *hosts.Host, peer string, vni int) error {
	t.Helper()
	for _, p := range view[[]struct {
		Name     string
		Networks []int
	}](t, h, "peers") {
		if p.Name == peer && slices.Contains(p.Networks, vni) {
			return nil
		}
	}
	return errors.New("weft peers does not show it")
}

func (s *swarmInput) listed(t *testing.T, service string) []hosts.Task {
	t.Helper()
	tasks, err := s.a.Tasks(t.Context(), service)
	if err != nil {
		t.Fatal(err)
	}
	return tasks
}

// route gives one host a route of its own into the subnets of networks of the Swarm.
func (s *swarmInput) route(t *testing.T) {
	const dockers, ours = 87, 88
	s.network(t, "app", dockers)
	s.network(t, "own", ours, "--ipam-driver", hosts.PluginName)
	for name, second := range map[string]int{"app": dockers, "own": ours} {
		prefix := fmt.Sprintf("10.%d.0.0/16", second)
		if _, err := s.c.Exec(t.Context(), "ip", "route", "add", prefix, "via", "192.0.2.1"); err != nil {
			t.Fatal(err)
		}
		before := held(t, s.c)
		s.createService(t, s.a, name, "--mode", "global", "--network", name)
		reason := fmt.Sprintf("overlaps the host's route %s on eth0 (host c)", prefix)
		eventually(t, 60*time.Second, "tasks of "+name+" run on a and b alone", func(ctx context.Context) error {
			out, err := s.a.Docker(ctx, "service", "ps", "--no-trunc", "--format", "{{.Node}} {{.Error}}", name)
			if err == nil && !strings.Contains(out, reason) {
				err = fmt.Errorf("docker service ps shows %s", out)
			}
			tasks := s.listed(t, name)
			for _, h := range []*hosts.Host{s.a, s.b} {
				if !slices.ContainsFunc(onHost(tasks, h), func(t hosts.Task) bool { return t.State == "running" }) {
					err = errors.Join(err, fmt.Errorf("none runs on %s: %+v", h.Name, tasks))
				}
			}
			return err
		})
		running := slices.DeleteFunc(s.listed(t, name), func(t hosts.Task) bool { return t.State != "running" || !t.Live() })
		if len(running) != 2 || len(onHost(running, s.c)) > 0 {
			t.Errorf("running are %+v", running)
		}
		s.mesh(t, name, running)
		says(t, s.c, []string{reason})
		// Docker does not tell the reason here.
		refused(t, s.c, []string{"attaching to network failed"}, "run", "--rm", "--network", name, hosts.Image, "true")
		if now := held(t, s.c); now != before {
			t.Errorf("on host c something came of it:\n%s", difference(before, now))
		}
		if _, err := s.c.Exec(t.Context(), "ip", "route", "del", prefix, "via", "192.0.2.1"); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		s.mesh(t, name, s.tasks(t, s.a, name, 3))
		says(t, s.c, nil)
		figure(t, "swarm: subnet of "+name+" overlaps one host's route on "+s.name, 1,
			"2 tasks ran elsewhere, none there; with the route gone it took its task after %s", time.Since(start).Round(100*time.Millisecond))
	}
	s.removeServices(t, "app", "own")
	s.removeNetworks(t, "app", "own")
	s.forgotten(t)
}

// held is what a network of ours could leave on a host, and the host's routes.
func held(t *testing.T, h *hosts.Host) string {
	t.Helper()
	out, err := h.Exec(t.Context(), "sh", "-c", "ls /sys/class/net; ip route; ipset save | grep weft || true")
	if err != nil {
		t.Fatal(err)
	}
	return out
}
