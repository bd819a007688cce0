package hosts

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/vishvananda/netns"
)

// InNetNS runs f on a thread in the network namespace at path, such as
// /proc/PID/ns/net. Sockets that f makes stay in it after f returned; goroutines
// that f starts are not in it.
func InNetNS(path string, f func() error) error {
	result := make(chan error)
	go func() {
		// A thread of its own: it is thrown away if it cannot come back.
		runtime.LockOSThread()
		err, back := inNetNS(path, f)
		if back {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

func inNetNS(path string, f func() error) (err error, back bool) {
	here, err := netns.Get()
	if err != nil {
		return err, true
	}
	defer func() { err = errors.Join(err, here.Close()) }()
	there, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err), true
	}
	defer func() { err = errors.Join(err, there.Close()) }()
	if err := netns.Set(there); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err), true
	}
	err = f()
	if serr := netns.Set(here); serr != nil {
		return errors.Join(err, serr), false
	}
	return err, true
}
