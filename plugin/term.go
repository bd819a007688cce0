package main

import (
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// termFile lies in the state folder.
const termFile = "term"

// term tells apart the times in which Docker's Swarm repeats what it has: it asks for
// the capabilities first whenever this host becomes the leader. No clock is asked, since
// one may be set back meanwhile. A child of which Docker knows nothing goes on with the
// term of the one before.
type term struct {
	path string
	log  *slog.Logger
	now  atomic.Uint64 // a random number; 0: Docker has not asked yet
	mu   sync.Mutex    // held while the file is written
}

// openTerm reads the term in which the process before was. What cannot be read is 0,
// and then all that was ever asked for counts.
func openTerm(path string, log *slog.Logger) *term {
	t := &term{path: path, log: log}
	if raw, err := os.ReadFile(path); err == nil {
		n, _ := strconv.ParseUint(strings.TrimSpace(string(raw)), 16, 64)
		t.now.Store(n)
	}
	return t
}

// begin starts another term. It does not wait for the disk, since Docker's own start
// waits for the answer.
func (t *term) begin() {
	t.now.Store(rand.Uint64() | 1) // not 0
	go t.keep()
}

func (t *term) keep() {
	t.mu.Lock()
	defer t.mu.Unlock()
	// Not synced: it has to outlive the process, not the machine.
	text := strconv.FormatUint(t.now.Load(), 16) + "\n"
	if err := os.WriteFile(t.path, []byte(text), 0o600); err != nil {
		t.log.Warn("the term of Swarm's leader is not kept for the next process", "err", err)
	}
}
