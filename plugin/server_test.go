package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// echo is the request and the answer of the test's own calls.
type echo struct {
	Name   string
	Number int
	Inner  struct{ Flag bool }
}

// testServer serves calls on a socket in a folder of the test.
type testServer struct {
	server
	socket string
	log    *syncBuffer
	stop   context.CancelFunc
	ended  chan error
}

type syncBuffer struct {
	mu  sync.Mutex // guards buf
	buf strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func serveTest(t *testing.T, limit time.Duration, calls ...call) *testServer {
	t.Helper()
	g := newGate()
	s := &testServer{log: &syncBuffer{}, socket: filepath.Join(t.TempDir(), "d.sock"), ended: make(chan error, 1)}
	s.server = server{gate: g, metrics: newMetrics(g), log: slog.New(slog.NewTextHandler(s.log, nil)), limit: limit}
	l, err := listenUnix(s.socket)
	if err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, s.stop = context.WithCancel(t.Context())
	go func() { s.ended <- serveHTTP(ctx, l, s.handler(calls), s.server.log) }()
	t.Cleanup(s.stop)
	return s
}

// call posts a body and returns status and answer.
func (s *testServer) call(t *testing.T, method string, body io.Reader) (int, string) {
	t.Helper()
	return s.do(t, http.MethodPost, method, body)
}

func (s *testServer) do(t *testing.T, verb, method string, body io.Reader) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), verb, "http://plugin/"+method, body)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.socket)
	}}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(raw))
}

// onEcho is a call that decodes an echo and runs fn.
func onEcho(fn func(context.Context, echo) (any, error)) call {
	return call{method: "Test.Echo", serve: func(ctx context.Context, _ *gate, body []byte) (any, error) {
		req, err := decode[echo]("Test.Echo", body)
		if err != nil {
			return nil, err
		}
		return fn(ctx, req)
	}}
}

func TestBadRequestsChangeNothingAndNameTheField(t *testing.T) {
	var ran atomic.Int32
	s := serveTest(t, time.Second, onEcho(func(_ context.Context, e echo) (any, error) { ran.Add(1); return e, nil }))
	for _, c := range []struct {
		name, verb, path string
		body             string
		status           int
		want             string // part of Err
	}{
		{"empty body", "POST", "Test.Echo", "", 500, "request is empty"},
		{"GET", "GET", "Test.Echo", "", 405, "wants POST"},
		{"PUT", "PUT", "Test.Echo", "{}", 405, "wants POST"},
		{"null", "POST", "Test.Echo", "null", 400, "not a JSON object"},
		{"array", "POST", "Test.Echo", "[]", 400, "not a JSON object"},
		{"string", "POST", "Test.Echo", `"x"`, 400, "not a JSON object"},
		{"cut", "POST", "Test.Echo", `{"Name":"a`, 400, "not valid JSON at byte 10"},
		{"two values", "POST", "Test.Echo", `{} {}`, 400, "not valid JSON"},
		{"wrong type", "POST", "Test.Echo", `{"Name":5}`, 400, "field Name: got number, want string"},
		{"wrong inner type", "POST", "Test.Echo", `{"Inner":{"Flag":"yes"}}`, 400, "field Inner.Flag: got string, want bool"},
		{"object for number", "POST", "Test.Echo", `{"Number":{}}`, 400, "field Number: got object, want number"},
		{"fraction", "POST", "Test.Echo", `{"Number":1.5}`, 400, "field Number"},
		{"deep", "POST", "Test.Echo", `{"x":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`, 400, "JSON"},
		{"huge", "POST", "Test.Echo", `{"Name":"` + strings.Repeat("a", bodyLimit) + `"}`, 413, "larger than 1048576 bytes"},
		{"unknown method", "POST", "NetworkDriver.Nonsense", "{}", 404, `does not know "NetworkDriver.Nonsense"`},
		{"root", "POST", "", "{}", 404, "does not know"},
		{"dots", "POST", "%2e%2e/etc", "{}", 404, "does not know"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, body := s.do(t, c.verb, c.path, strings.NewReader(c.body))
			var reply errorReply
			if err := json.Unmarshal([]byte(body), &reply); err != nil {
				t.Fatalf("answer %q is not JSON: %v", body, err)
			}
			if status != c.status || !strings.Contains(reply.Err, c.want) {
				t.Errorf("got %d %q, want %d and an Err with %q", status, body, c.status, c.want)
			}
		})
	}
	if ran.Load() != 0 {
		t.Errorf("%d bad requests reached the call", ran.Load())
	}
}

func TestUnknownFieldsAreAccepted(t *testing.T) {
	s := serveTest(t, time.Second, onEcho(func(_ context.Context, e echo) (any, error) { return e, nil }))
	status, body := s.call(t, "Test.Echo", strings.NewReader(`{"Name":"a","FromTheFuture":{"x":[1]}}`))
	if want := `{"Name":"a","Number":0,"Inner":{"Flag":false}}`; status != 200 || body != want {
		t.Errorf("got %d %s, want 200 %s", status, body, want)
	}
}

func TestFailureIsToldToTheUserAndLoggedOnce(t *testing.T) {
	s := serveTest(t, time.Second, onEcho(func(context.Context, echo) (any, error) { return nil, errors.New("address is taken") }))
	status, body := s.call(t, "Test.Echo", strings.NewReader(`{"NetworkID":"0123456789abcdef"}`))
	if status != 200 || body != `{"Err":"address is taken","Error":"address is taken"}` {
		t.Errorf("got %d %s", status, body)
	}
	log := s.log.String()
	if strings.Count(log, "\n") != 1 || !strings.Contains(log, "method=Test.Echo") || !strings.Contains(log, "id=0123456789ab ") || !strings.Contains(log, `err="address is taken"`) {
		t.Errorf("log is\n%s", log)
	}
}

func TestPanicIsAnAnswer(t *testing.T) {
	s := serveTest(t, time.Second, onEcho(func(_ context.Context, e echo) (any, error) {
		if e.Name == "boom" {
			panic("boom")
		}
		return e, nil
	}))
	if status, body := s.call(t, "Test.Echo", strings.NewReader(`{"Name":"boom"}`)); status != 200 || !strings.Contains(body, "internal error in Test.Echo: boom") {
		t.Errorf("got %d %s", status, body)
	}
	if !strings.Contains(s.log.String(), "server_test.go") {
		t.Errorf("no stack in the log:\n%s", s.log)
	}
	if status, _ := s.call(t, "Test.Echo", strings.NewReader(`{}`)); status != 200 {
		t.Errorf("the next call got %d", status)
	}
}

func TestCallEndsInTimeAndNamesWhatItWaitsFor(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	s := serveTest(t, time.Second, // a tenth of it is what an answer may take
		onEcho(func(ctx context.Context, e echo) (any, error) {
			if e.Name == "deaf" {
				<-release // as a call that is stuck in the kernel
				return nil, nil
			}
			<-ctx.Done()
			return nil, errors.New("waiting for the kernel")
		}),
		call{method: "Test.Gated", serve: func(ctx context.Context, g *gate, _ []byte) (any, error) { return g.wait(ctx) }},
	)
	s.gate.at("opening the database")
	for _, c := range []struct{ method, body, want string }{
		{"Test.Echo", `{}`, "waiting for the kernel"},
		{"Test.Echo", `{"Name":"deaf"}`, "no answer within 1s: Test.Echo is still at work"},
		{"Test.Gated", `{}`, "still opening the database"},
	} {
		start := time.Now()
		status, body := s.call(t, c.method, strings.NewReader(c.body))
		if took := time.Since(start); status != 200 || !strings.Contains(body, c.want) || took > 5*time.Second {
			t.Errorf("%s %s: got %d %s after %s, want %q", c.method, c.body, status, body, took, c.want)
		}
	}
}

func TestGateTellsWhyAndOpensLater(t *testing.T) {
	g := newGate()
	g.fail(errors.New("the disk is full"))
	if _, err := g.wait(t.Context()); err == nil || !strings.Contains(err.Error(), "the disk is full") {
		t.Errorf("got %v", err)
	}
	want := &services{}
	g.open(want)
	if svc, err := g.wait(t.Context()); svc != want || err != nil {
		t.Errorf("got %v, %v", svc, err)
	}
}

func TestCallersThatGoAwayDoNotStopACall(t *testing.T) {
	started, finished := make(chan struct{}), make(chan error, 1)
	s := serveTest(t, 5*time.Second, onEcho(func(ctx context.Context, _ echo) (any, error) {
		close(started)
		select {
		case <-ctx.Done():
			finished <- ctx.Err()
		case <-time.After(200 * time.Millisecond):
			finished <- nil
		}
		return nil, nil
	}))
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(conn, "POST /Test.Echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
	<-started
	conn.Close()
	if err := <-finished; err != nil {
		t.Errorf("the call was stopped: %v", err)
	}
}

func TestTruncatedAndSlowRequestsAreDropped(t *testing.T) {
	var ran atomic.Int32
	s := serveTest(t, time.Second, onEcho(func(context.Context, echo) (any, error) { ran.Add(1); return nil, nil }))
	const body = `{"Name":"abc"}`
	for cut := range len(body) {
		conn, err := net.Dial("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /Test.Echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:cut])
		if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil && resp.StatusCode == http.StatusOK {
			t.Errorf("cut at byte %d: answered 200", cut)
		}
		conn.Close()
	}
	if ran.Load() != 0 {
		t.Errorf("%d truncated requests reached the call", ran.Load())
	}
}

func TestParallelCalls(t *testing.T) {
	const n = 200
	var together sync.WaitGroup
	together.Add(n)
	s := serveTest(t, 20*time.Second, onEcho(func(_ context.Context, e echo) (any, error) {
		together.Done()
		together.Wait() // ends only when all are in flight at once
		return e, nil
	}))
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() {
			if _, body := s.call(t, "Test.Echo", strings.NewReader(fmt.Sprintf(`{"Number":%d}`, i))); !strings.Contains(body, fmt.Sprintf(`"Number":%d,`, i)) {
				t.Errorf("call %d got %s", i, body)
			}
		})
	}
	calls.Wait()
}

func TestShutdownLetsCallsFinish(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	s := serveTest(t, 20*time.Second, onEcho(func(_ context.Context, e echo) (any, error) {
		close(started)
		<-release
		return e, nil
	}))
	answered := make(chan string, 1)
	go func() {
		_, body := s.call(t, "Test.Echo", strings.NewReader(`{"Name":"late"}`))
		answered <- body
	}()
	<-started
	s.stop()
	select {
	case err := <-s.ended:
		t.Fatalf("the server ended before its call: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	if body := <-answered; !strings.Contains(body, "late") {
		t.Errorf("got %s", body)
	}
	if err := <-s.ended; err != nil {
		t.Error(err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "s.sock")
	first, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	first.(*net.UnixListener).SetUnlinkOnClose(false) // as after kill -9
	first.Close()
	second, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", st.Mode(), err)
	}
}

// What Docker asks while it starts must be answered while nothing is ready, and
// even when nothing works.
func TestStartOfDockerIsNotHeldUp(t *testing.T) {
	for _, broken := range []bool{false, true} {
		s := serveTest(t, time.Second, testProcess().routes()...)
		if broken {
			s.gate.fail(errors.New("the database is damaged"))
		}
		for method, want := range map[string]string{
			"Plugin.Activate":                    `{"Implements":["NetworkDriver","IpamDriver"]}`,
			"NetworkDriver.GetCapabilities":      `{"Scope":"local","ConnectivityScope":"global","GwAllocChecker":false}`,
			"NetworkDriver.EndpointOperInfo":     `{"Value":{}}`,
			"NetworkDriver.GwAllocCheck":         `{"SkipIPv4":false,"SkipIPv6":false}`,
			"IpamDriver.GetCapabilities":         `{"RequiresMACAddress":false,"RequiresRequestReplay":false}`,
			"IpamDriver.GetDefaultAddressSpaces": `{"LocalDefaultAddressSpace":"WeftLocal","GlobalDefaultAddressSpace":"WeftGlobal"}`,
		} {
			if status, body := s.call(t, method, nil); status != 200 || body != want {
				t.Errorf("broken %v: %s answered %d %s, want %s", broken, method, status, body, want)
			}
		}
		node := `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.1","BindAddress":"192.0.2.1","Self":true}}`
		if status, body := s.call(t, "NetworkDriver.DiscoverNew", strings.NewReader(node)); status != 200 || body != "{}" {
			t.Errorf("broken %v: NetworkDriver.DiscoverNew answered %d %s", broken, status, body)
		}
		if !broken {
			continue
		}
		for _, c := range testProcess().routes() {
			if c.noBody || strings.HasPrefix(c.method, "NetworkDriver.Discover") {
				continue
			}
			if status, body := s.call(t, c.method, strings.NewReader(`{}`)); status != 200 || !strings.Contains(body, "the database is damaged") {
				t.Errorf("%s answered %d %s", c.method, status, body)
			}
		}
	}
}
