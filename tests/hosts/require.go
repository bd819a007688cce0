package hosts

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// TB is the part of testing.TB that Require needs.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Require skips the test unless the machine has what it needs: "root", "docker"
// (dockerd and the programs beside it), "engine" (the newest one), "guest" (a virtual
// machine of tests/guest.sh), "firewall" (what tests/firewall.sh unpacks). Where WEFT_TEST_MUST lists the word, the test fails instead.
func Require(t TB, words ...string) {
	t.Helper()
	must := strings.FieldsFunc(os.Getenv("WEFT_TEST_MUST"), func(r rune) bool { return r == ',' || r == ' ' })
	for _, w := range words {
		missing := missing(w)
		switch {
		case missing == "":
		case slices.Contains(must, w):
			t.Fatalf("missing: %s", missing)
		default:
			t.Skipf("missing: %s", missing)
		}
	}
}

// InGuest says whether this is the guest in which a test runs others, and starts none
// itself. Everything takes longer there.
func InGuest() bool { return os.Getenv("WEFT_GUEST") == "1" }

// Patience is a limit of time as it is where nothing is slow, or the guest's.
func Patience(d time.Duration) time.Duration {
	if InGuest() {
		return 6 * d
	}
	return d
}

// GuestDir is where tests/guest.sh puts the guest.
func GuestDir() (string, error) {
	if dir := os.Getenv("WEFT_GUEST_DIR"); dir != "" {
		return dir, nil
	}
	cache, err := os.UserCacheDir()
	return filepath.Join(cache, "weft", "guest"), err
}

// FirewallDir is where tests/firewall.sh puts ufw and firewalld.
func FirewallDir() (string, error) {
	if dir := os.Getenv("WEFT_FIREWALL_DIR"); dir != "" {
		return dir, nil
	}
	cache, err := os.UserCacheDir()
	return filepath.Join(cache, "weft", "firewall"), err
}

func missing(word string) string {
	switch word {
	case "root":
		if os.Geteuid() != 0 {
			return "root; run make test, which asks sudo"
		}
	case "docker":
		for _, p := range []string{"dockerd", "docker", "busybox", "iptables", "ip", "bridge", "ipset", "nsenter", "unshare"} {
			if _, err := exec.LookPath(p); err != nil {
				return p + "; run tests/setup.sh"
			}
		}
	case "engine":
		if _, err := Newest(); err != nil {
			return err.Error()
		}
	case "guest":
		if InGuest() {
			return "a machine that is no guest itself"
		}
		dir, err := GuestDir()
		if err == nil {
			_, err = os.Stat(filepath.Join(dir, "version"))
		}
		if err != nil {
			return "the guest: " + err.Error() + "; run tests/guest.sh"
		}
		if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
			return "qemu-system-x86_64; install qemu-system-x86"
		}
	case "firewall":
		dir, err := FirewallDir()
		if err == nil {
			_, err = os.Stat(filepath.Join(dir, "version"))
		}
		if err != nil {
			return "ufw and firewalld: " + err.Error() + "; run tests/firewall.sh"
		}
	default:
		return "nothing known by the word " + word
	}
	return ""
}
