package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// path is a pair of network namespaces to measure between: a client's and a
// server's, each given by the file of its namespace, and the server's address.
type path struct {
	name           string
	client, server string
	address        netip.Addr
}

// figures is what one round over a path gave. All are rates over the round; zero
// means not measured.
type figures struct {
	tcp1, tcp4 float64       // bits per second, 1 and 4 streams
	cpuPerGB   float64       // busy seconds of the machine per 10^9 bytes, 4 streams
	udp        float64       // packets of 64 bytes received per second
	rr         float64       // one-byte requests answered per second, one connection
	rrP99      time.Duration // of one request
	crr        float64       // connections made, used for one request and closed per second
}

// measure runs all flows over the path once, each for about d.
func (p path) measure(d time.Duration) (f figures, err error) {
	if f.tcp1, _, err = p.stream(1, d); err != nil {
		return f, fmt.Errorf("%s: 1 stream: %w", p.name, err)
	}
	if f.tcp4, f.cpuPerGB, err = p.stream(4, d); err != nil {
		return f, fmt.Errorf("%s: 4 streams: %w", p.name, err)
	}
	if f.udp, err = p.packets(d); err != nil {
		return f, fmt.Errorf("%s: packets: %w", p.name, err)
	}
	if f.rr, f.rrP99, err = p.requests(d); err != nil {
		return f, fmt.Errorf("%s: requests: %w", p.name, err)
	}
	if f.crr, err = p.connections(d); err != nil {
		return f, fmt.Errorf("%s: connections: %w", p.name, err)
	}
	return f, nil
}

// inside runs fn on a thread of its own in the network namespace. The thread is
// never unlocked, so that the runtime discards it with the goroutine.
func inside(namespace string, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		f, err := os.Open(namespace)
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = f.Close() }()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter %s: %w", namespace, err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// The sockets are raw and blocking: Go's poller would add its own cost to each
// request. Time-outs end a read when the other side is gone.

func socket(kind int, a netip.Addr) (int, error) {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	timeout := unix.Timeval{Sec: 2}
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout))
	if kind == unix.SOCK_STREAM {
		// The machine's default may be another (bbr), which costs throughput.
		err = errors.Join(err, unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic"),
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	}
	return fd, err
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is6() {
		return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
}

func portOf(fd int) (int, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	switch s := sa.(type) {
	case *unix.SockaddrInet4:
		return s.Port, nil
	case *unix.SockaddrInet6:
		return s.Port, nil
	}
	return 0, errors.New("a socket without a port")
}

// open makes a bound server socket and its port, and a connected client socket.
func (p path) open(kind int) (server, client int, err error) {
	port := 0
	err = inside(p.server, func() (err error) {
		if server, err = socket(kind, p.address); err != nil {
			return err
		}
		if err := unix.Bind(server, sockaddr(p.address, 0)); err != nil {
			return err
		}
		if kind == unix.SOCK_STREAM {
			if err := unix.Listen(server, 16); err != nil {
				return err
			}
		}
		port, err = portOf(server)
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	client, err = p.connect(kind, port)
	return server, client, err
}

func (p path) connect(kind, port int) (fd int, err error) {
	err = inside(p.client, func() (err error) {
		if fd, err = socket(kind, p.address); err != nil {
			return err
		}
		return unix.Connect(fd, sockaddr(p.address, port))
	})
	return fd, err
}

// stream sends as much as it can over n connections for d and returns the bits
// that arrived per second, and the machine's busy seconds per GB.
func (p path) stream(n int, d time.Duration) (rate, cpuPerGB float64, err error) {
	server, first, err := p.open(unix.SOCK_STREAM)
	if err != nil {
		return 0, 0, err
	}
	defer closeAll(server)
	port, err := portOf(server)
	if err != nil {
		return 0, 0, err
	}
	clients := []int{first}
	for len(clients) < n {
		c, err := p.connect(unix.SOCK_STREAM, port)
		if err != nil {
			return 0, 0, err
		}
		clients = append(clients, c)
	}
	var received atomic.Int64
	var wait sync.WaitGroup
	for range clients {
		conn, _, err := accept(server)
		if err != nil {
			return 0, 0, err
		}
		wait.Go(func() {
			defer closeAll(conn)
			buf := make([]byte, 256<<10)
			for {
				k, err := read(conn, buf)
				if k <= 0 || err != nil {
					return
				}
				received.Add(int64(k))
			}
		})
	}
	busy, start := busySeconds(), time.Now()
	end := start.Add(d)
	for _, c := range clients {
		wait.Go(func() {
			defer closeAll(c)
			buf := make([]byte, 128<<10)
			for time.Now().Before(end) {
				if _, err := write(c, buf); err != nil {
					return
				}
			}
		})
	}
	wait.Wait()
	bytes, took := float64(received.Load()), time.Since(start).Seconds()
	return bytes * 8 / took, (busySeconds() - busy) / (bytes / 1e9), nil
}

// packets sends 64-byte datagrams as fast as it can for d and returns how many
// arrived per second.
func (p path) packets(d time.Duration) (float64, error) {
	server, client, err := p.open(unix.SOCK_DGRAM)
	if err != nil {
		return 0, err
	}
	defer closeAll(server, client)
	_ = unix.SetsockoptInt(server, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	var received atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 128)
		for {
			k, err := read(server, buf)
			if err != nil || k == 1 { // a single byte ends the run
				return
			}
			received.Add(1)
		}
	}()
	start := time.Now()
	end, buf := start.Add(d), make([]byte, 64)
	for time.Now().Before(end) {
		for range 64 {
			if _, err := write(client, buf); err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ECONNREFUSED) {
				return 0, err
			}
		}
	}
	rate := float64(received.Load()) / time.Since(start).Seconds()
	for range 10 {
		_, _ = write(client, buf[:1])
	}
	<-done
	return rate, nil
}

// requests sends one byte and waits for one, over one connection, for d.
func (p path) requests(d time.Duration) (rate float64, p99 time.Duration, err error) {
	server, client, err := p.open(unix.SOCK_STREAM)
	if err != nil {
		return 0, 0, err
	}
	defer closeAll(server)
	conn, _, err := accept(server)
	if err != nil {
		return 0, 0, err
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		runtime.LockOSThread()
		defer closeAll(conn)
		buf := make([]byte, 1)
		for {
			if k, err := read(conn, buf); k <= 0 || err != nil {
				return
			}
			if _, err := write(conn, buf); err != nil {
				return
			}
		}
	})
	var times []time.Duration
	buf := make([]byte, 1)
	start := time.Now()
	for before := start; before.Sub(start) < d; {
		if _, err := write(client, buf); err != nil {
			return 0, 0, err
		}
		if _, err := read(client, buf); err != nil {
			return 0, 0, err
		}
		now := time.Now()
		times = append(times, now.Sub(before))
		before = now
	}
	took := time.Since(start)
	closeAll(client)
	wait.Wait()
	slices.Sort(times)
	return float64(len(times)) / took.Seconds(), times[len(times)*99/100], nil
}

// connections makes a connection, sends a byte, waits for one and closes, for d.
func (p path) connections(d time.Duration) (rate float64, err error) {
	server, first, err := p.open(unix.SOCK_STREAM)
	if err != nil {
		return 0, err
	}
	port, err := portOf(server)
	if err != nil {
		return 0, err
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		runtime.LockOSThread()
		buf := make([]byte, 1)
		for {
			conn, _, err := accept(server)
			if err != nil {
				return
			}
			if k, err := read(conn, buf); k == 1 && err == nil {
				_, _ = write(conn, buf)
				_, _ = read(conn, buf) // until the client closes: no port waits here
			}
			closeAll(conn)
		}
	})
	closeAll(first)
	n, start := 0, time.Now()
	err = inside(p.client, func() error {
		buf := make([]byte, 1)
		for time.Since(start) < d {
			fd, err := socket(unix.SOCK_STREAM, p.address)
			if err != nil {
				return err
			}
			// A port that waits for late packets could not be used again in time.
			err = errors.Join(unix.Connect(fd, sockaddr(p.address, port)), unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
			if err == nil {
				_, err = write(fd, buf)
			}
			if err == nil {
				_, err = read(fd, buf)
			}
			closeAll(fd)
			if errors.Is(err, unix.EINTR) {
				continue // a signal of the runtime's
			}
			if err != nil {
				return err
			}
			n++
		}
		return nil
	})
	rate = float64(n) / time.Since(start).Seconds()
	_ = unix.Shutdown(server, unix.SHUT_RDWR) // ends accept
	wait.Wait()
	closeAll(server)
	return rate, err
}

// The runtime's signals interrupt raw calls: these try again.

func read(fd int, buf []byte) (int, error) {
	for {
		if n, err := unix.Read(fd, buf); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func write(fd int, buf []byte) (int, error) {
	for {
		if n, err := unix.Write(fd, buf); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func accept(fd int) (int, unix.Sockaddr, error) {
	for {
		if c, from, err := unix.Accept(fd); !errors.Is(err, unix.EINTR) {
			return c, from, err
		}
	}
}

func closeAll(fds ...int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// busySeconds returns the time that all CPUs have not been idle, from /proc/stat
// (proc(5): user nice system idle iowait irq softirq steal, in ticks of 10 ms).
func busySeconds() float64 {
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	total := 0.0
	for i, f := range strings.Fields(line)[1:] {
		if v, err := strconv.ParseFloat(f, 64); err == nil && i < 8 && i != 3 && i != 4 {
			total += v / 100
		}
	}
	return total
}
