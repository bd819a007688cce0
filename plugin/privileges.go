package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// keptCapabilities are all that the process keeps of what Docker gives a plugin.
//
//	CAP_NET_ADMIN         links, forwarding and neighbour entries, ipset, iptables
//	CAP_NET_RAW           iptables and its set match ask the kernel through raw sockets
//	CAP_NET_BIND_SERVICE  published ports below 1024 are held by a socket (hold.go)
//	CAP_BPF               the port program and its maps
func keptCapabilities() []uintptr {
	return []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE, unix.CAP_BPF}
}

// dropPrivileges takes from the process, and from all that it will start, every
// capability but keptCapabilities, and the possibility to gain others. Docker adds
// its whole default set to a plugin whatever config.json lists, and sets no
// seccomp filter, so this is the only fence.
//
// The bounding set is cut too: uid 0 has no more than that after exec, and exactly
// that, which is how iptables gets its capabilities.
func dropPrivileges() error {
	last, err := lastCapability()
	if err != nil {
		return err
	}
	var kept uint64
	for _, c := range keptCapabilities() {
		kept |= 1 << c
	}
	for c := uintptr(0); c <= last; c++ {
		if kept&(1<<c) != 0 {
			continue
		}
		// Without CAP_SETPCAP nothing can be dropped from the bounding set: a
		// process that was started with few capabilities keeps those limits anyway.
		err := prctl(unix.PR_CAPBSET_DROP, c)
		if errors.Is(err, unix.ENOTSUP) {
			return errors.New("a binary with cgo cannot do it for all its threads; build with CGO_ENABLED=0")
		}
		if err != nil && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	if err := prctl(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	return limitTo(kept)
}

// limitTo cuts the permitted, effective and inheritable sets of all threads.
func limitTo(kept uint64) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var now [2]unix.CapUserData
	if err := unix.Capget(&header, &now[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range now {
		k := uint32(kept >> (32 * i))
		now[i] = unix.CapUserData{Effective: now[i].Permitted & k, Permitted: now[i].Permitted & k, Inheritable: 0}
	}
	// Capabilities belong to a thread; the runtime has several by now.
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&now[0])), 0)
	if errno != 0 {
		return fmt.Errorf("set capabilities: %w", errno)
	}
	return nil
}

func prctl(option, arg uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, option, arg, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// lastCapability returns the highest capability that the kernel knows.
func lastCapability() (uintptr, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 6)
	return uintptr(n), err
}
