package tests

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/weftnet/weft/tests/hosts"
)

// TestUpgrade changes the plugin under running containers.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	older, newer := pluginDir(t, "failpoint", "crash"), pluginDir(t, "", "newer")
	lab := newLab(t, 2, nil)
	install(t, lab, older)
	createNetwork(t, lab, "app", 32, "--ipam-driver", hosts.PluginName)
	from, to := run(t, lab.Hosts[0], "from", "--network", "app"), run(t, lab.Hosts[1], "to", "--network", "app")
	reach(t, from, addressOf(t, to, "app").String())
	t.Run("keeps traffic", func(t *testing.T) { upgradeKeepsTraffic(t, from, to, older, newer) })
	t.Run("leaves a newer schema alone", func(t *testing.T) { newerSchemaIsLeftAlone(t, from, to) })
}

// upgradeKeepsTraffic disables and enables the plugin, and puts another build in
// its place as docker plugin upgrade does.
func upgradeKeepsTraffic(t *testing.T, from, to hosts.Container, older, newer string) {
	rounds := 1
	if soak() {
		rounds = 50
	}
	a, peer := from.Host, addressOf(t, to, "app")
	address, network := addressOf(t, from, "app"), docker(t, a, "network", "inspect", "--format", "{{.Id}}", "app")
	probe := startProbe(t, from, to, peer)

	var off []time.Duration
	for range rounds {
		off = append(off, whileDisabled(t, a, func() {
			// Nobody repairs anything now; traffic goes on all the same.
			reach(t, from, peer.String())
		}))
	}
	clean(t, a)
	versions := []string{versionOf(t, a)}
	for i := range 2 * rounds {
		dir := newer
		if i%2 == 1 {
			dir = older
		}
		off = append(off, whileDisabled(t, a, func() { replaceRootfs(t, a, dir) }))
		versions = append(versions, versionOf(t, a))
		clean(t, a)
	}
	said := strings.Join(versions[:3], ", ")
	if want := "crash, newer, crash"; said != want {
		t.Errorf("the plugin said that it was %s, want %s", said, want)
	}
	if got := addressOf(t, from, "app"); got != address {
		t.Errorf("the container's address was %s and is %s", address, got)
	}
	if got := docker(t, a, "network", "inspect", "--format", "{{.Id}}", "app"); got != network {
		t.Errorf("the network was %s and is %s", network, got)
	}
	// The network is usable as before.
	late := run(t, a, "late", "--network", "app")
	reach(t, late, peer.String())
	if got := addressOf(t, late, "app"); got == address {
		t.Errorf("the address %s was given out again", got)
	}
	docker(t, a, "rm", "--force", "late")
	r := lossless(t, probe)
	figure(t, "plugin disable -f, enable; upgrade to another build and back", rounds, "%d of %d packets lost, TCP %s; off for p50 %s; addresses and networks kept; versions %s",
		r.Lost, r.Sent, broken(r), percentile(off, 50), said)
}

// newerSchemaIsLeftAlone starts an older plugin on a newer plugin's database.
func newerSchemaIsLeftAlone(t *testing.T, from, to hosts.Container) {
	a, file := from.Host, databaseFile(t, from.Host)
	probe := startProbe(t, from, to, addressOf(t, to, "app"))
	before := inventory(t, a)
	var schema uint64
	whileDisabled(t, a, func() { schema = setSchema(t, file, 99) })

	start := time.Now()
	_, err := a.Docker(t.Context(), "run", "--rm", "--network", "app", hosts.Image, "true")
	took := time.Since(start)
	if err == nil || !strings.Contains(err.Error(), "its schema is 99") || !strings.Contains(err.Error(), "install the newer plugin") {
		t.Errorf("a container's start was answered with %v", err)
	}
	status, err := a.Exec(t.Context(), "weft", "status")
	if !strings.Contains(status, "its schema is 99") {
		t.Errorf("weft status does not say it (%v):\n%s", err, status)
	}
	whileDisabled(t, a, func() {
		if got := setSchema(t, file, schema); got != 99 {
			t.Errorf("the schema was changed from 99 to %d", got)
		}
	})
	unleaked(t, a, before, "plugin file")
	clean(t, a)
	docker(t, a, "run", "--rm", "--network", "app", hosts.Image, "true")
	r := lossless(t, probe)
	figure(t, "older plugin on a newer database", 1, "refused after %s with the reason, %d of %d packets lost, TCP %s; works again once the newer one is back",
		took.Round(time.Millisecond), r.Lost, r.Sent, broken(r))
}

// whileDisabled does something while the plugin is off, and returns for how long
// no call was served.
func whileDisabled(t *testing.T, h *hosts.Host, fn func()) time.Duration {
	t.Helper()
	start := time.Now()
	docker(t, h, "plugin", "disable", "--force", hosts.PluginName)
	fn()
	docker(t, h, "plugin", "enable", hosts.PluginName)
	if _, err := h.WaitPlugin(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	return time.Since(start)
}

// replaceRootfs does to a disabled plugin what docker plugin upgrade does once it
// has the newer one from a registry: another root file system, the same settings
// and state (moby plugin/manager_linux.go, upgradePlugin).
func replaceRootfs(t *testing.T, h *hosts.Host, dir string) {
	t.Helper()
	id, err := h.PluginID(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rootfs := filepath.Join(h.Dir, "data/plugins", id, "rootfs")
	if err := os.Rename(rootfs, rootfs+"-old"); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", filepath.Join(dir, "rootfs"), rootfs).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.RemoveAll(rootfs + "-old"); err != nil {
		t.Fatal(err)
	}
	if err := h.LinkCommand(dir); err != nil {
		t.Fatal(err)
	}
}

// versionOf is what the running plugin says of itself.
func versionOf(t *testing.T, h *hosts.Host) string {
	t.Helper()
	var v struct {
		Plugin *struct{ Version string }
	}
	eventually(t, 10*time.Second, "the plugin tells its version", func(ctx context.Context) error {
		out, err := h.Exec(ctx, "weft", "version", "-o", "json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &v); err != nil {
			return err
		}
		if v.Plugin == nil {
			return errors.New("it does not answer")
		}
		return nil
	})
	return v.Plugin.Version
}

func databaseFile(t *testing.T, h *hosts.Host) string {
	t.Helper()
	state, err := h.StateDir(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(state, "weft.db")
}

// setSchema writes the schema's number into a database that nobody has open, and
// returns what it was.
func setSchema(t *testing.T, file string, to uint64) (was uint64) {
	t.Helper()
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		meta := tx.Bucket([]byte("meta"))
		raw := meta.Get([]byte("schema"))
		if len(raw) != 8 {
			return fmt.Errorf("schema is %x", raw)
		}
		was = binary.BigEndian.Uint64(raw)
		return meta.Put([]byte("schema"), binary.BigEndian.AppendUint64(nil, to))
	})
	if cerr := db.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		t.Fatal(err)
	}
	return was
}
