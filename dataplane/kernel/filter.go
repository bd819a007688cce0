package kernel

import (
	"errors"
	"fmt"
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

// filterOf returns the name of our filter on the link, or "".
func (k *Kernel) filterOf(index int32) (string, error) {
	all, err := k.filters(index, netlink.HANDLE_MIN_INGRESS)
	for _, f := range all {
		if f.ours {
			return f.name, err
		}
	}
	return "", err
}

// attach makes the program stand on the link, in place of an older one at once.
func (k *Kernel) attach(index int32, where int) error {
	if name, err := k.filterOf(index); err != nil || name == k.program.name[where] {
		return err
	}
	attrs := netlink.QdiscAttrs{LinkIndex: int(index), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
	err := k.handle.QdiscAdd(&netlink.GenericQdisc{QdiscAttrs: attrs, QdiscType: "clsact"})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact: %w", err)
	}
	prog := *k.program.programs()[where]
	err = k.handle.FilterReplace(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: int(index), Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: filterPriority},
		Fd:          prog.FD(), Name: k.program.name[where], DirectAction: true,
	})
	if err != nil {
		return fmt.Errorf("attach the port program: %w", err)
	}
	return nil
}

// detach takes our filter off the link, and the place for filters if nobody else's is
// there.
func (k *Kernel) detach(index int32) error {
	all, err := k.filters(index, netlink.HANDLE_MIN_INGRESS)
	if err != nil || !containsOurs(all) {
		return err
	}
	err = k.handle.FilterDel(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: int(index), Parent: netlink.HANDLE_MIN_INGRESS,
		Handle: 1, Protocol: unix.ETH_P_ALL, Priority: filterPriority}})
	if err != nil && !gone(err) {
		return fmt.Errorf("detach the port program: %w", err)
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		if left, err := k.filters(index, parent); err != nil || len(left) > 0 {
			return err
		}
	}
	err = k.handle.QdiscDel(&netlink.GenericQdisc{QdiscType: "clsact",
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: int(index), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	if err != nil && !gone(err) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clsact: %w", err)
	}
	return nil
}

func containsOurs(all []filter) bool {
	for _, f := range all {
		if f.ours {
			return true
		}
	}
	return false
}
