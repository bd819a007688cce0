package tests

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// guestLimit bounds the guest, which computes without the processor's help.
const guestLimit = 10 * time.Minute

// TestGuest runs tests of networks of all kinds, of the port program and of SCTP in a
// virtual machine with Debian's stock kernel, which has WireGuard and SCTP as modules.
// tests/guest.sh makes it.
func TestGuest(t *testing.T) {
	t.Parallel()
	hosts.Require(t, "guest")
	work := guestWork(t)
	for name, pkg := range map[string]string{"kernel.test": "../dataplane/kernel", "plugin.test": "../plugin"} {
		build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", filepath.Join(work, name), pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	which := []string{"TestSCTP", "TestEncryptedTraffic", "TestRoamedPeer", "TestProgramLoads", "TestGuard", "TestFlowsAreCounted",
		"TestFastPath/vxlan/both", "TestFastPath/routed/both", "TestRunningContainersFollow/.*/known_true"}
	if soak() {
		which = []string{"TestSCTP", "TestEncryptedTraffic", "TestRoamedPeer", "TestSuiteNft/round_trip", "TestSuiteNft/repair/encrypted", "TestSuiteNft/repair/own_gateway", "TestSuiteNft/repair/routed", "TestSuiteNft/repair/program",
			"TestProgramLoads", "TestGuard", "TestFlows", "TestFastPath", "TestRunningContainersFollow", "TestHops", "TestTraffic", "TestServices", "TestPublishedEndpoints", "TestAnswers", "TestDirectAnswers", "TestAllTasks", "TestVXLAN", "TestTunnelHolds",
			"TestClearedMaps", "TestUpgradeKeeps"}
	}
	script := fmt.Sprintf("modprobe sctp && modprobe xt_sctp && export WEFT_GUEST=1 WEFT_TEST_MUST=root &&\n"+
		"/plugin.test -test.v -test.run TestHoldPort && /kernel.test -test.v -test.run '%s'\n", strings.Join(which, "|"))
	if err := os.WriteFile(filepath.Join(work, "run.sh"), []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(work, "initramfs")
	if err := addToImage(t.Context(), work, image, "kernel.test", "plugin.test", "run.sh"); err != nil {
		t.Fatal(err)
	}
	out, took, err := runGuest(t, "1G", image)
	passed := regexp.MustCompile(`(?m)^ *--- PASS: `).FindAll(out, -1)
	if err != nil || !bytes.Contains(out, []byte("GUEST ends with 0")) || bytes.Contains(out, []byte("GUEST no module")) || len(passed) < 10 {
		t.Fatalf("%v; the guest printed:\n%s", err, out)
	}
	for _, name := range which { // one that is called otherwise now would not be missed
		if !regexp.MustCompile(`--- PASS: ` + strings.ReplaceAll(name, "/", `[^/ ]*/[^/ ]*`)).Match(out) {
			t.Errorf("no test of the guest is called %s", name)
		}
	}
	figure(t, "kernel's WireGuard in a guest with Linux "+guestKernel(t, out), len(passed), "all passed, in %s", took)
	for line := range strings.Lines(string(out)) {
		if i := strings.Index(line, "SCORE "); i >= 0 {
			t.Log(strings.TrimSpace(line[i:]))
		}
	}
}

// guestWork makes a folder for what a guest is made of, which goes with the test, or with
// all tests if they are interrupted.
func guestWork(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(tempDir, "guest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// oneGuest keeps guests from each other's processor: Docker and the plugin have limits of
// time of their own, which two guests beside the other tests would come near to.
var oneGuest sync.Mutex

// runGuest runs a guest without any link to its end and returns what it printed, and how
// long it took.
func runGuest(t *testing.T, memory, image string, args ...string) ([]byte, time.Duration, error) {
	t.Helper()
	dir, err := hosts.GuestDir()
	if err != nil {
		return nil, 0, err
	}
	limit := guestLimit
	if soak() {
		limit *= 12
	}
	oneGuest.Lock()
	defer oneGuest.Unlock()
	ctx, cancel := context.WithTimeout(interrupted, limit)
	defer cancel()
	labs.Add(1) // TestMain waits for it too
	defer labs.Done()
	start := time.Now()
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", append([]string{"-accel", "tcg,thread=multi", "-smp", "2", "-m", memory, "-nographic", "-no-reboot", "-nic", "none",
		"-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", image, "-append", "console=ttyS0 quiet panic=-1"}, args...)...).CombinedOutput()
	return out, time.Since(start).Round(time.Second), err
}

// guestKernel is the release of the guest's kernel.
func guestKernel(t *testing.T, out []byte) string {
	t.Helper()
	release := regexp.MustCompile(`GUEST kernel (\S+)`).FindSubmatch(out)
	if release == nil {
		t.Fatalf("the guest does not tell its kernel:\n%s", out)
	}
	return string(release[1])
}

// addToImage writes the guest's initramfs with files of a folder added: the kernel unpacks
// archives one after the other (Documentation/driver-api/early-userspace/buffer-format).
func addToImage(ctx context.Context, dir, image string, files ...string) error {
	base, err := hosts.GuestDir()
	if err != nil {
		return err
	}
	first, err := os.ReadFile(filepath.Join(base, "initramfs.gz"))
	if err != nil {
		return err
	}
	first = append(first, make([]byte, (4-len(first)%4)%4)...)
	cmd := exec.CommandContext(ctx, "busybox", "cpio", "-o", "-L", "-H", "newc")
	cmd.Dir = dir
	cmd.Stdin = strings.NewReader(strings.Join(files, "\n") + "\n")
	archive, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("cpio: %w", err)
	}
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(first); err != nil {
		return err
	}
	w, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, bytes.NewReader(archive)); err != nil {
		return err
	}
	return w.Close()
}
