//go:build failpoint

package store

import (
	"os"
	"strings"
	"syscall"
)

// FailPointFile names, in a test build, the file whose content is the step at
// which the process kills itself. It is removed first, so that it happens once.
// The empty path switches fail points off. Set it before any call.
var FailPointFile string

// FailPoint ends the process at once, as a crash would, if the step was asked for.
func FailPoint(step string) {
	if FailPointFile == "" {
		return
	}
	raw, err := os.ReadFile(FailPointFile)
	if err != nil || strings.TrimSpace(string(raw)) != step {
		return
	}
	if os.Remove(FailPointFile) == nil {
		// Not by SIGKILL: the first process of a container, which the plugin
		// is, does not get it from itself. No deferred call runs.
		syscall.Exit(137)
	}
}
