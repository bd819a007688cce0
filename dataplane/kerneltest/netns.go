package kerneltest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Need skips the test unless there is what it needs, or fails it if WEFT_TEST_MUST
// (words separated by commas) names it.
func Need(t testing.TB, word string, there bool, missing string) {
	t.Helper()
	if there {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("WEFT_TEST_MUST"), ","), word) {
		t.Fatalf("%s, and WEFT_TEST_MUST names %s", missing, word)
	}
	t.Skip(missing)
}

// Netns moves the calling goroutine, which must be the test's, into a new network
// namespace. Its thread is never used for anything else and ends with the test,
// and the namespace with it. Subtests are goroutines of their own: they start
// outside and call Netns themselves.
func Netns(t testing.TB) {
	t.Helper()
	Need(t, "root", os.Geteuid() == 0, "needs root to make network namespaces")
	runtime.LockOSThread()
	if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	Run(t, "ip", "link", "set", "lo", "up")
}

// Run runs a program in the calling thread's namespace and returns what it
// printed.
func Run(t testing.TB, program string, args ...string) string {
	t.Helper()
	out, err := output(append([]string{program}, args...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func output(words []string) (string, error) {
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(words, " "), err, out)
	}
	return string(out), nil
}

// Script runs lines of programs, as Run does. A line that begins with # is a
// remark.
func Script(t testing.TB, lines string) {
	t.Helper()
	for line := range strings.Lines(lines) {
		if f := strings.Fields(line); len(f) > 0 && !strings.HasPrefix(f[0], "#") {
			Run(t, f[0], f[1:]...)
		}
	}
}

// MakeUnderlay makes the link that Suite wants, in the calling thread's namespace:
// one end of a veth pair.
func MakeUnderlay(t testing.TB) {
	t.Helper()
	Script(t, `
		ip link add `+UnderlayLink+` type veth peer name under1
		ip addr add `+Underlay4.String()+`/24 dev `+UnderlayLink+`
		ip addr add `+Underlay6.String()+`/64 dev `+UnderlayLink+` nodad
		ip link set `+UnderlayLink+` up
		ip link set under1 up
	`)
}

// Child returns the only child of a process.
func Child(t testing.TB, parent int) int {
	t.Helper()
	var children []byte
	paths, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent)) // proc(5)
	for _, path := range paths {
		raw, _ := os.ReadFile(path) // the thread may have ended
		children = append(children, raw...)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		t.Fatalf("children of process %d are %q", parent, children)
	}
	return pid
}
