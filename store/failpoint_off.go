//go:build !failpoint

package store

// FailPoint marks a step at which a test kills the process (build tag
// "failpoint"). In a normal build it does nothing.
func FailPoint(string) {}
