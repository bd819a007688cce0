package kernel

import (
	"testing"

	"github.com/weftnet/weft/dataplane/kernel/bpf"
)

// ClearDests makes the port program know no destination.
func (k *Kernel) ClearDests(t *testing.T) {
	t.Helper()
	if err := clearMap[bpf.ProgramDestKey, bpf.ProgramDest](k.program.objects.WeftDests); err != nil {
		t.Fatal(err)
	}
}
