package kernel

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/dataplane"
)

// toolTime bounds one call of an iptables program. It waits 5 s for the lock of
// the legacy backend itself.
const toolTime = 15 * time.Second

// run runs a program of iptables and returns what it printed.
func run(ctx context.Context, path, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, toolTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	if err := cmd.Run(); err != nil {
		words := strings.Join(strings.Fields(errOut.String()), " ")
		return "", fmt.Errorf("%s: %w: %s", path, err, words)
	}
	return out.String(), nil
}

// apply runs operations on chains and jumps, and returns one error per op.
func (r *ruler) apply(ctx context.Context, ops []dataplane.Op) []error {
	r.mu.Lock()
	defer r.mu.Unlock()
	errs := make([]error, len(ops))
	if err := r.detectLocked(ctx); err != nil {
		return fill(errs, err)
	}
	r.seen = nil
	for _, v6 := range []bool{false, true} {
		var family []int // the ops of this family
		for i, op := range ops {
			table, is6 := where(op.Object)
			_, other, isStale := strings.Cut(table, "@")
			switch {
			case isStale && !v6:
				errs[i] = r.sweepLocked(other, op)
			case isStale || is6 != v6:
			case v6 && r.ipv6Off():
				r.pretendLocked(op)
			default:
				family = append(family, i)
			}
		}
		r.applyFamilyLocked(ctx, v6, ops, family, errs)
	}
	return errs
}

// where returns the table and family of a chain or jump.
func where(o dataplane.Object) (table string, v6 bool) {
	switch o := o.(type) {
	case dataplane.Chain:
		return o.Table, o.V6
	case dataplane.Jump:
		return o.Table, o.V6
	}
	return "", false
}

func (r *ruler) pretendLocked(op dataplane.Op) {
	if op.Verb == dataplane.Put {
		r.noV6[op.Object.Key()] = op.Object
	} else {
		delete(r.noV6, op.Object.Key())
	}
}

// applyFamilyLocked runs the ops with the given places in one restore. That is all
// or nothing, so after a failure they are tried one by one, to do what can be done
// and to know which one fails.
func (r *ruler) applyFamilyLocked(ctx context.Context, v6 bool, ops []dataplane.Op, places []int, errs []error) {
	if len(places) == 0 {
		return
	}
	all := r.restoreLocked(ctx, v6, ops, places)
	if all == nil {
		return
	}
	for _, i := range places {
		if len(places) > 1 && ctx.Err() == nil {
			errs[i] = r.restoreLocked(ctx, v6, ops, []int{i})
		} else {
			errs[i] = all
		}
	}
}

func (r *ruler) restoreLocked(ctx context.Context, v6 bool, ops []dataplane.Op, places []int) error {
	rs, err := r.saveLocked(ctx, r.backend, v6)
	if err != nil {
		return err
	}
	s := script{rules: rs, lines: map[string][]string{}}
	for _, i := range places {
		s.add(ops[i])
	}
	if len(s.lines) == 0 {
		return nil
	}
	args := []string{"--noflush"}
	if r.backend == legacy {
		args = append(args, "-w", "5")
	}
	_, err = run(ctx, r.tools[r.backend].restore[v6], s.String(), args...)
	return err
}

// script is the input of one iptables-restore.
type script struct {
	rules ruleset             // as they are when the lines have run
	lines map[string][]string // by table
}

func (s *script) line(table, format string, args ...any) {
	s.lines[table] = append(s.lines[table], fmt.Sprintf(format, args...))
}

func (s *script) add(op dataplane.Op) {
	switch o := op.Object.(type) {
	case dataplane.Chain:
		if op.Verb == dataplane.Put {
			s.putChain(o)
		} else {
			s.deleteChain(o)
		}
	case dataplane.Jump:
		s.deleteJumps(o.Table, o.From, o.To)
		if op.Verb == dataplane.Put {
			s.line(o.Table, "-I %s %d %s", o.From, usersJump(s.rules[o.Table][o.From])+2, jumpSpec(o.To))
		}
	}
}

// putChain makes the chain or empties it, and fills it.
func (s *script) putChain(c dataplane.Chain) {
	s.line(c.Table, ":%s - [0:0]", c.Name)
	rules := c.RuleLines()
	for i, text := range rules {
		s.line(c.Table, `-A %s -m comment --comment "%s" %s`, c.Name, ruleComment(c.Hash, i+1, len(rules)), text)
	}
}

// deleteChain removes the chain and every rule of others that jumps to it, which
// would keep it.
func (s *script) deleteChain(c dataplane.Chain) {
	if _, there := s.rules[c.Table][c.Name]; !there {
		return
	}
	for _, from := range sortedKeys(s.rules[c.Table]) {
		s.deleteJumps(c.Table, from, c.Name)
	}
	s.line(c.Table, "-F %s", c.Name)
	s.line(c.Table, "-X %s", c.Name)
	delete(s.rules[c.Table], c.Name)
}

// deleteJumps removes every rule of a chain that jumps to another.
func (s *script) deleteJumps(table, from, to string) {
	rules := s.rules[table][from]
	for _, r := range rules {
		if r.target == to {
			s.line(table, "-D %s %s", from, r.spec)
		}
	}
	if rules != nil {
		s.rules[table][from] = slices.DeleteFunc(rules, func(r rule) bool { return r.target == to })
	}
}

// String returns the input, one transaction per table.
func (s *script) String() string {
	var b strings.Builder
	for _, table := range sortedKeys(s.lines) {
		fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", table, strings.Join(s.lines[table], "\n"))
	}
	return b.String()
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
