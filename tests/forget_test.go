package tests

import (
	"strings"
	"testing"

	"github.com/weftnet/weft/tests/hosts"
)

// TestForget removes networks in Docker while the plugin is off: Docker's call is lost,
// and weft forget frees what they had.
func TestForget(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 1, nil)
	h := lab.Hosts[0]
	install(t, lab, pluginDir(t, "", "test"))
	create := func(name, subnet string, more ...string) (string, error) {
		args := append([]string{"network", "create", "-d", hosts.PluginName, "--ipam-driver", hosts.PluginName, "--subnet", subnet}, more...)
		return h.Docker(t.Context(), append(args, name)...)
	}
	for name, subnet := range map[string]string{"lost": "10.97.0.0/16", "kept": "10.98.0.0/16"} {
		if out, err := create(name, subnet); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	run(t, h, "there", "--network", "kept")
	id := networkOf(t, h, "lost").ID
	docker(t, h, "plugin", "disable", "--force", hosts.PluginName)
	docker(t, h, "network", "rm", "lost") // answers when it has waited for the plugin
	docker(t, h, "plugin", "enable", hosts.PluginName)

	remedy := "weft forget " + id[:12]
	if _, err := create("again", "10.97.0.0/16"); err == nil || !strings.Contains(err.Error(), remedy) {
		t.Errorf("the subnet of a network that is lost: %v, want an error that says %q", err, remedy)
	}
	if out, err := h.Exec(t.Context(), "weft", "audit"); err == nil || !strings.Contains(out, remedy) {
		t.Errorf("weft audit does not say %q: %v\n%s", remedy, err, out)
	}
	for name, why := range map[string]string{"kept": "docker network rm kept", "nobody": "weft networks lists them"} {
		if out, err := h.Exec(t.Context(), "weft", "forget", name); err == nil || !strings.Contains(err.Error()+out, why) {
			t.Errorf("weft forget %s: %v, want an error that says %q\n%s", name, err, why, out)
		}
	}
	if out, err := h.Exec(t.Context(), "weft", "forget", id[:12]); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	clean(t, h)
	if out, err := create("again", "10.97.0.0/16"); err != nil {
		t.Errorf("after weft forget: %v: %s", err, out)
	}
	figure(t, "weft forget of a network whose removal was lost", 1, "subnet, VNI and pool are free; others stay")
}
