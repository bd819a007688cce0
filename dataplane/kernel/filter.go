package kernel

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A program stands on a link as a tc filter on ingress (tc-bpf(8)), which needs no pin:
// it goes on when its process has died.

// filter is one that stands on a link.
type filter struct {
	name     string // "": no program
	priority uint16
	ours     bool
}

// filters returns what stands on the link's ingress or egress.
func (k *Kernel) filters(index int32, parent uint32) ([]filter, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETTFILTER, 0)
	req.AddData(&nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: index, Parent: parent})
	msgs, err := k.route.dump(req)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil, nil // no such link, or nothing was ever put there
	}
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	var out []filter
	for _, m := range msgs {
		if len(m) < nl.SizeofTcMsg {
			continue
		}
		f := filter{priority: uint16(nl.NativeEndian().Uint32(m[16:]) >> 16)}
		for t, v := range attrs(m[nl.SizeofTcMsg:]) {
			if t != nl.TCA_OPTIONS {
				continue
			}
			for t, v := range attrs(v) {
				if t == nl.TCA_BPF_NAME {
					f.name = text(v)
				}
			}
		}
		f.ours = strings.HasPrefix(f.name, filterPrefix)
		if f.name != "" || f.priority != filterPriority {
			out = append(out, f)
		}
	}
	return out, nil
}

// parents are where a program stands on its link.
var parents = [...]uint32{onEndpoint: netlink.HANDLE_MIN_INGRESS, onUnderlay: netlink.HANDLE_MIN_INGRESS, onEgress: netlink.HANDLE_MIN_EGRESS, onTunnel: netlink.HANDLE_MIN_INGRESS}

// stands reports whether the program stands on the link as this process would put it.
func (k *Kernel) stands(index int32, where int) (bool, error) {
	all, err := k.filters(index, parents[where])
	return slices.ContainsFunc(all, func(f filter) bool { return f.name == k.program.name[where] }), err
}

// attach makes the program stand on the link, in place of an older one at once.
func (k *Kernel) attach(index int32, where int) error {
	if there, err := k.stands(index, where); err != nil || there {
		return err
	}
	err := k.handle.QdiscAdd(clsact(index))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact: %w", err)
	}
	f := ourFilter(index, parents[where])
	f.Fd, f.Name, f.DirectAction = (*k.program.programs()[where]).FD(), k.program.name[where], true
	if err := k.handle.FilterReplace(f); err != nil {
		return fmt.Errorf("attach the port program: %w", err)
	}
	return nil
}

func clsact(index int32) netlink.Qdisc {
	attrs := netlink.QdiscAttrs{LinkIndex: int(index), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
	return &netlink.GenericQdisc{QdiscAttrs: attrs, QdiscType: "clsact"}
}

func ourFilter(index int32, parent uint32) *netlink.BpfFilter {
	return &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: int(index), Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: filterPriority}}
}

// detach takes our filters off the link, and the place for filters if nobody else's is
// there.
func (k *Kernel) detach(index int32) error {
	found, others := false, false
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		all, err := k.filters(index, parent)
		if err != nil {
			return err
		}
		for _, f := range all {
			if !f.ours {
				others = true
				continue
			}
			found = true
			if err := k.handle.FilterDel(ourFilter(index, parent)); err != nil && !gone(err) {
				return fmt.Errorf("detach the port program: %w", err)
			}
		}
	}
	if !found || others {
		return nil
	}
	if err := k.handle.QdiscDel(clsact(index)); err != nil && !gone(err) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clsact: %w", err)
	}
	return nil
}
