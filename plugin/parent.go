package main

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/weftnet/weft/dataplane/kernel"
)

// A child is started again at once, and one that did not live for childLived after a
// pause of childFirst, doubled up to childMost.
const (
	childLived = time.Second
	childFirst = 50 * time.Millisecond
	childMost  = 5 * time.Second
)

// inheritFlag tells a child that its sockets are open already, as the file descriptors
// 3 (Docker's) and 4 (admin), and that those of the port program follow; noProgramFlag
// why they do not; parentFlag tells the children of one parent from those of another.
const (
	inheritFlag      = "inherit"
	noProgramFlag    = "no-program"
	parentFlag       = "parent"
	firstProgramFile = 5
)

// keepChild has a child do all the work on the plugin's sockets, and starts it again
// whenever that ends. It is the process that Docker knows, and exists for two reasons:
// Docker disables a plugin that dies within half a second of its start, until somebody
// enables it; and while a child is replaced, calls wait in the sockets' queue in place
// of failing. It returns when it was told to end and the child has.
func keepChild(args []string, docker, admin net.Listener, port *kernel.Program, log *slog.Logger) error {
	files := []*os.File{nil, os.Stdout, os.Stderr}
	for _, l := range []net.Listener{docker, admin} {
		// The copy stays open over the children, and the sockets in their place.
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			return fmt.Errorf("socket for the child: %w", err)
		}
		defer f.Close()
		files = append(files, f)
	}
	args = append(append([]string{os.Args[0], "plugin"}, args...), "-"+inheritFlag, "-"+parentFlag, strconv.FormatUint(rand.Uint64(), 16))
	if err := port.Err(); err != nil {
		args = append(args, "-"+noProgramFlag, err.Error())
	}
	files = append(files, port.Files()...)
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(told)
	// A child dies with the thread that made it (Pdeathsig); this one stays.
	runtime.LockOSThread()
	program, err := os.Executable() // by its name, for who looks at processes
	if err != nil {
		return fmt.Errorf("find the program: %w", err)
	}
	pause := time.Duration(0)
	for {
		begun := time.Now()
		child, err := os.StartProcess(program, args,
			&os.ProcAttr{Files: files, Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}})
		if err != nil {
			return fmt.Errorf("start the plugin's work: %w", err)
		}
		ended := make(chan syscall.WaitStatus, 1)
		go func() { ended <- waitFor(child.Pid) }()
		select {
		case s := <-told:
			_ = child.Signal(s) // it may just have ended
			if status := <-ended; status.ExitStatus() != 0 {
				return fmt.Errorf("plugin did not end well: %s", describe(status))
			}
			return nil
		case status := <-ended:
			lived := time.Since(begun)
			if pause = min(max(2*pause, childFirst), childMost); lived >= childLived {
				pause = 0
			}
			log.Error("weft died and is started again; networks and traffic stay", "how", describe(status), "lived", lived.Round(time.Millisecond), "pause", pause)
		}
		select {
		case <-told:
			return nil
		case <-time.After(pause):
		}
	}
}

// waitFor waits for a child. What it leaves behind becomes ours, as the first process
// of a container, and is waited for too.
func waitFor(child int) syscall.WaitStatus {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if pid == child || err != nil && err != syscall.EINTR {
			return status
		}
	}
}

func describe(s syscall.WaitStatus) string {
	if s.Signaled() {
		return "signal " + s.Signal().String()
	}
	return fmt.Sprintf("exit status %d", s.ExitStatus())
}
