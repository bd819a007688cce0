package main

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
)

// termFile lies in the state folder.
const termFile = "term"

// term tells apart the times in which Docker's Swarm repeats what it has: it asks for
// the capabilities first whenever this host becomes the leader. No clock is asked, since
// one may be set back meanwhile. A child of which Docker knows nothing goes on with the
// term of the one before.
//
// Docker asks for them, too, when it has started the plugin, once or for each of its
// parts that knows drivers, and then, on a leader, repeats nothing: to it only the plugin
// is new. Those questions end with the first one about the IPAM driver.
type term struct {
	path   string
	parent string // of this child, told from others
	log    *slog.Logger
	now    atomic.Uint64 // a random number; 0: Docker has not asked yet
	asked  atomic.Bool   // the questions after the parent's start have ended
	doubt  atomic.Bool   // this term began with one of those
	mu     sync.Mutex    // held while the file is written
}

// openTerm reads the term in which the process before was. What cannot be read is 0,
// and then all that was ever asked for counts.
func openTerm(path, parent string, log *slog.Logger) *term {
	t := &term{path: path, parent: parent, log: log}
	var now uint64
	var former string
	var asked, doubt bool
	if raw, err := os.ReadFile(path); err == nil {
		_, _ = fmt.Sscanf(string(raw), "%x %s %t %t", &now, &former, &asked, &doubt) // as far as it goes
	}
	t.now.Store(now)
	same := former != "" && former == parent
	t.asked.Store(same && asked)
	t.doubt.Store(!same || doubt)
	return t
}

// begin starts another term. It does not wait for the disk, since Docker's own start
// waits for the answer.
func (t *term) begin() {
	t.doubt.Store(!t.asked.Load())
	t.now.Store(rand.Uint64() | 1) // not 0
	go t.keep()
}

// settle notes that Docker has asked what it asks after a start of the plugin.
func (t *term) settle() {
	if t.asked.CompareAndSwap(false, true) {
		go t.keep()
	}
}

func (t *term) keep() {
	t.mu.Lock()
	defer t.mu.Unlock()
	// Not synced: it has to outlive the process, not the machine.
	text := fmt.Sprintf("%x %s %t %t\n", t.now.Load(), t.parent, t.asked.Load(), t.doubt.Load())
	if err := os.WriteFile(t.path, []byte(text), 0o600); err != nil {
		t.log.Warn("the term of Swarm's leader is not kept for the next process", "err", err)
	}
}
