package dataplane

import "errors"

// What the port program's maps have no room for is no failure: trying on would not help,
// and networks work without destinations. The loop takes it for done until it reads the
// kernel again, tries once more then, and takes neither for a repair.

// splitFull returns the failures but for want of room, and the objects that lacked it.
func splitFull(all []*OpError) (errs []*OpError, full map[Key]bool) {
	full = map[Key]bool{}
	for _, err := range all {
		if errors.Is(err, ErrFull) {
			full[err.Op.Object.Key()] = true
		} else {
			errs = append(errs, err)
		}
	}
	return errs, full
}

// noteFull notes what a pass found no room for; a fresh one tried all.
func (n *network) noteFull(fresh bool, ops []Op, full map[Key]bool) {
	if fresh {
		n.full = nil
	}
	for _, op := range ops {
		delete(n.full, op.Object.Key())
	}
	for key := range full {
		if n.full == nil {
			n.full = map[Key]bool{}
		}
		n.full[key] = true
	}
}

// possible leaves out the operations for which there was no room.
func (n *network) possible(ops []Op) (out []Op) {
	for _, op := range ops {
		if op.Verb == Delete || !n.full[op.Object.Key()] {
			out = append(out, op)
		}
	}
	return out
}

// countFull counts what there was no room for, by kind; nil: there was.
func (n *network) countFull() map[string]int {
	if len(n.full) == 0 {
		return nil
	}
	out := map[string]int{}
	for key := range n.full {
		out[key.Kind.String()]++
	}
	return out
}
