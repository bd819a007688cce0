package hosts

import (
	"os"
	"os/exec"
	"slices"
	"strings"
)

// TB is the part of testing.TB that Require needs.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Require skips the test unless the machine has what it needs: "root", "docker"
// (dockerd and the programs beside it), "engine" (the newest one). Where
// WEFT_TEST_MUST lists the word, the test fails instead.
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
	default:
		return "nothing known by the word " + word
	}
	return ""
}
