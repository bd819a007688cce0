//go:build !failpoint

package main

import "time"

// auditEvery is how often the audits look; 0 means as they do by themselves.
const auditEvery = 0

// useFailPoints does something only in a test build.
func useFailPoints(string) {}

// auditClock returns the clock of the audits; nil means time.Now.
func auditClock(string) func() time.Time { return nil }

// testVerbs are the verbs that only a test build has.
func testVerbs() []verb { return nil }
