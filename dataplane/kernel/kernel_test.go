package kernel_test

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// newKernel returns the kernel of a new namespace with an underlay.
func newKernel(t testing.TB, cfg kernel.Config) *kernel.Kernel {
	t.Helper()
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	return open(t, cfg)
}

// open returns the kernel of the calling thread's namespace, until the test ends.
func open(t testing.TB, cfg kernel.Config) *kernel.Kernel {
	t.Helper()
	cfg.Program = kernel.LoadProgram("")
	if err := cfg.Program.Err(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cfg.Program.Close)
	cfg.Log, cfg.WireGuardKey = slog.New(slog.NewTextHandler(t.Output(), nil)), kerneltest.WireGuardKey
	k, err := kernel.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func TestSuiteNft(t *testing.T) {
	t.Parallel()
	kerneltest.Suite(t, func(t *testing.T) dataplane.Kernel { return newKernel(t, kernel.Config{Backend: "nft"}) })
}

func TestSuiteLegacy(t *testing.T) {
	t.Parallel()
	kerneltest.Suite(t, func(t *testing.T) dataplane.Kernel { return newKernel(t, kernel.Config{Backend: "legacy"}) })
}

func pass(t testing.TB, k *kernel.Kernel, e kerneltest.Example) []dataplane.Op {
	t.Helper()
	want, err := e.Plan()
	if err != nil {
		t.Fatal(err)
	}
	have, err := k.Read(t.Context(), e.Snapshot.VNI)
	if err != nil {
		t.Fatal(err)
	}
	ops := dataplane.Diff(want, have)
	for _, err := range k.Apply(t.Context(), ops) {
		t.Errorf("apply: %v", err)
	}
	return ops
}

func passHost(t testing.TB, k *kernel.Kernel, want dataplane.Plan) []dataplane.Op {
	t.Helper()
	have, err := k.Read(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	ops := dataplane.Diff(want, have)
	for _, err := range k.Apply(t.Context(), ops) {
		t.Errorf("apply: %v", err)
	}
	return ops
}

func settled(t testing.TB, k *kernel.Kernel, e kerneltest.Example) {
	t.Helper()
	if ops := append(pass(t, k, e), passHost(t, k, e.HostPlan())...); len(ops) != 0 {
		t.Errorf("still to do: %v", ops)
	}
}

func lines(s string) []string { return strings.FieldsFunc(s, func(c rune) bool { return c == '\n' }) }
