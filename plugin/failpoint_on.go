//go:build failpoint

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

// auditEvery: a test waits for the audits.
const auditEvery = time.Second

// useFailPoints makes the file "failpoint" in the state folder name the step at
// which the process dies.
func useFailPoints(state string) { store.FailPointFile = filepath.Join(state, "failpoint") }

// auditClock returns a clock that goes ahead by what the file "ahead" in the
// state folder says, such as 30m: the grace times of the audits pass at once.
func auditClock(state string) func() time.Time {
	return func() time.Time {
		now := time.Now()
		if raw, err := os.ReadFile(filepath.Join(state, "ahead")); err == nil {
			if d, err := time.ParseDuration(strings.TrimSpace(string(raw))); err == nil {
				return now.Add(d)
			}
		}
		return now
	}
}

// testVerbs are the verbs that only a test build has.
func testVerbs() []verb {
	return []verb{{name: "failpoints", help: "steps at which this test build can be killed", hidden: true,
		prepare: simple(func(_ context.Context, c *cli) error {
			for _, step := range slices.Concat(driver.FailPoints(), ipam.FailPoints(), kernel.FailPoints()) {
				fmt.Fprintln(c.out, step)
			}
			return nil
		})}}
}
