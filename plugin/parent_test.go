package main

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/weftnet/weft/dataplane/kerneltest"
)

// outlivesItsChild kills the process that does the work, again and again. No call
// fails for it, and what Swarm was told by is kept.
func outlivesItsChild(t *testing.T, program string) {
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	p := start(t, program, t.TempDir())
	p.mustCall("NetworkDriver.GetCapabilities", `{}`)
	p.makeNetwork()
	parent := p.cmd.Process.Pid
	term := func() string { return kerneltest.Run(t, "cat", p.dir+"/state/"+termFile) }
	before := term()
	seen := map[int]bool{}
	for range 5 {
		child := p.child()
		if seen[child] {
			t.Fatalf("child %d lives again", child)
		}
		seen[child] = true
		if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.mustCall("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+strings.Repeat("b", 64)+`"}`) // waits for the next child
		if p.child() == child {
			t.Errorf("child %d still lives", child)
		}
	}
	p.mustAgree()
	if after := term(); after != before {
		t.Errorf("term was %s and is %s", before, after)
	}
	if p.cmd.Process.Pid != parent {
		t.Error("Docker's process changed")
	}
	if err := p.stop(syscall.SIGTERM); err != nil {
		t.Errorf("ended with %v", err)
	}
	if _, err := os.Stat(p.dir + "/run/" + dockerSocket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// takesItsChildAlong kills the process that Docker knows: the child must not work on
// beside the next one.
func takesItsChildAlong(t *testing.T, program string) {
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	p := start(t, program, t.TempDir())
	p.makeNetwork()
	child := p.child()
	_ = p.stop(syscall.SIGKILL) // killed is an error
	p.await("end of the child", func() bool { return syscall.Kill(child, 0) == syscall.ESRCH })
	p = start(t, program, p.dir)
	p.mustAgree()
}
