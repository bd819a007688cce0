package tests

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/weftnet/weft/tests/hosts"
)

// guestPlugin tells the tests in the guest the plugin's folder: to compile there takes
// too long.
const guestPlugin = "WEFT_GUEST_PLUGIN"

// TestGuestScenarios runs other tests of this package as they are, with dockerds and the
// managed plugin, in a guest with Debian's stock kernel and its WireGuard. The guest has
// this machine's files, which it can read alone, under a layer in its memory.
func TestGuestScenarios(t *testing.T) {
	t.Parallel()
	hosts.Require(t, "root", "docker", "guest")
	which := []string{"TestRouter/enc"}
	if soak() {
		which = []string{"TestEncryptedRefused", "TestRouter", "TestEncrypted/debian"}
	}
	work := guestWork(t)
	if err := os.WriteFile(filepath.Join(work, "run.sh"), []byte(scenarioScript(t, which)), 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(work, "initramfs")
	if err := addToImage(t.Context(), work, image, "run.sh"); err != nil {
		t.Fatal(err)
	}
	out, took, err := runGuest(t, "4G", image, "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap")
	results := regexp.MustCompile(`(?m)^ *--- (PASS|FAIL|SKIP): .*|^ *\S+_test\.go:\d+: SCORE .*`)
	for _, line := range results.FindAll(out, -1) {
		t.Logf("%s", bytes.TrimSpace(line))
	}
	if err != nil || !bytes.Contains(out, []byte("GUEST ends with 0")) || bytes.Contains(out, []byte("GUEST no module")) {
		t.Fatalf("%v; the guest printed:\n%s", err, out)
	}
	for _, name := range which {
		if !bytes.Contains(out, []byte("--- PASS: "+name+" ")) {
			t.Errorf("%s did not run in the guest", name)
		}
	}
	figure(t, "scenarios in a guest with the kernel's WireGuard, Linux "+guestKernel(t, out), len(which), "%s passed, in %s", strings.Join(which, ", "), took)
}

// scenarioScript is what the guest runs: each test alone, because it has two slow
// processors.
func scenarioScript(t *testing.T, which []string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	env := []string{"WEFT_GUEST=1", "WEFT_TEST_MUST=root,docker", guestPlugin + "=" + pluginDir(t, "", "test")}
	for _, name := range []string{"PATH", "HOME", "WEFT_ENGINE_DIR", "WEFT_FIREWALL_DIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	var script strings.Builder
	fmt.Fprintf(&script, `set -e
mkdir /host /layer /all
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 host /host
mount -t tmpfs -o size=80%% layer /layer
mkdir /layer/changed /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/changed,workdir=/layer/work all /all
cd /all
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t devtmpfs dev dev
mount -t tmpfs run run
mount -t tmpfs tmp var/tmp # Docker's layers cannot lie on another
mount -o move . / # who enters a mount namespace comes to its root
export %s
set +e
failed=0
`, quoted(env))
	for _, name := range which {
		pattern := "^" + strings.ReplaceAll(name, "/", "$/^") + "$"
		fmt.Fprintf(&script, "chroot . /bin/sh -c 'cd \"$0\" && exec \"$@\"' %s || failed=1\n", quoted([]string{here, self, "-test.v", "-test.timeout=2h", "-test.run=" + pattern}))
	}
	script.WriteString("exit $failed\n")
	return script.String()
}

// quoted makes words of a shell of texts.
func quoted(texts []string) string {
	var all []string
	for _, text := range texts {
		all = append(all, "'"+strings.ReplaceAll(text, "'", `'\''`)+"'")
	}
	return strings.Join(all, " ")
}
