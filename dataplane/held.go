package dataplane

import (
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// What peers own stays in the kernel while it is this host that may hear nobody. Records
// of many peers that fall silent at once stay in the plan (store.Deaf), so all works in
// both directions, and what is removed by somebody's will still goes.

// silence says that peers have their entries although they are silent for long, or "".
func silence(peers []store.Peer) string {
	hidden, silent := false, 0
	for _, p := range peers {
		hidden = hidden || p.Hidden
		if !p.DeadSince.IsZero() {
			silent++
		}
	}
	if !hidden {
		return ""
	}
	return fmt.Sprintf("%d of %d peers are silent at once; their entries stay until they are back or forgotten", silent, len(peers))
}

// withhold takes out the deletions that must wait: all of what peers own until the cluster
// is in sync.
func (l *Loop) withhold(v store.VNI, ops []Op) (_ []Op, held string) {
	if v == store.HostVNI || !slices.ContainsFunc(ops, foreignDelete) || l.inSync() {
		return ops, ""
	}
	s, err := l.db.Snapshot(v)
	if err != nil || s.Network == nil {
		return ops, ""
	}
	return slices.DeleteFunc(ops, foreignDelete), "the hosts have not been heard yet; entries of unknown peers stay until then"
}

func foreignDelete(op Op) bool {
	if op.Verb != Delete {
		return false
	}
	switch o := op.Object.(type) {
	case FDB:
		return o.Dst.IsValid() || o.Master && len(o.Link) > len(vxlanPrefix) && o.Link[:len(vxlanPrefix)] == vxlanPrefix
	case Dest:
		return o.Peer.IsValid()
	case Neigh:
		return !strings.HasPrefix(o.Link, vethPrefix)
	case Route:
		return o.Via.IsValid() || strings.HasPrefix(o.Link, tunnelPrefix)
	}
	return false
}
