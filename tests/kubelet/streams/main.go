// A client of the streams that a kubelet serves, made of Kubernetes' own: what kubectl does behind an API server.
//
//	kubelet-streams [-transport spdy|websocket] [-tty WIDTHxHEIGHT] exec|attach URL     its streams are ours
//	kubelet-streams [-transport spdy|websocket] forward URL PORT                        prints the local port
//
// It ends with the exit code of the command, or with 200 for any other failure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

const failure = 200

var (
	transport = flag.String("transport", "spdy", "spdy or websocket")
	tty       = flag.String("tty", "", "a terminal of WIDTHxHEIGHT")
)

func main() {
	flag.Parse()
	if err := run(flag.Args()); err != nil {
		var exit exec.CodeExitError
		if errors.As(err, &exit) {
			os.Exit(exit.Code)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(failure)
	}
}

func run(arguments []string) error {
	if len(arguments) < 2 {
		return errors.New("usage: exec|attach URL, or forward URL PORT")
	}
	target, err := url.Parse(arguments[1])
	if err != nil {
		return err
	}
	config := &rest.Config{Host: target.Host, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	if arguments[0] == "forward" {
		return forward(config, target, arguments[2])
	}
	return command(config, target)
}

func command(config *rest.Config, target *url.URL) error {
	executor, err := newExecutor(config, target)
	if err != nil {
		return err
	}
	options := remotecommand.StreamOptions{Stdout: os.Stdout}
	if target.Query().Has("input") {
		options.Stdin = os.Stdin
	}
	if *tty == "" {
		options.Stderr = os.Stderr
	} else {
		options.Tty = true
		size := &once{}
		if _, err := fmt.Sscanf(*tty, "%dx%d", &size.Width, &size.Height); err != nil {
			return err
		}
		options.TerminalSizeQueue = size
	}
	return executor.StreamWithContext(context.Background(), options)
}

func newExecutor(config *rest.Config, target *url.URL) (remotecommand.Executor, error) {
	if *transport == "websocket" {
		return remotecommand.NewWebSocketExecutor(config, http.MethodGet, target.String())
	}
	return remotecommand.NewSPDYExecutor(config, http.MethodPost, target)
}

// once is the size of a terminal that is never changed.
type once struct {
	remotecommand.TerminalSize
	told bool
}

func (o *once) Next() *remotecommand.TerminalSize {
	if o.told {
		return nil
	}
	o.told = true
	return &o.TerminalSize
}

// forward serves a local port until it is told to end.
func forward(config *rest.Config, target *url.URL, port string) error {
	dialer, err := newDialer(config, target)
	if err != nil {
		return err
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{"0:" + port}, stop, ready, nil, os.Stderr)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	go func() {
		<-signals
		close(stop)
	}()
	go func() {
		<-ready
		if ports, err := forwarder.GetPorts(); err == nil {
			fmt.Println(ports[0].Local)
		}
	}()
	return forwarder.ForwardPorts()
}

func newDialer(config *rest.Config, target *url.URL) (httpstream.Dialer, error) {
	if *transport == "websocket" {
		return portforward.NewSPDYOverWebsocketDialer(target, config)
	}
	roundTripper, upgrader, err := spdy.RoundTripperFor(config)
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: roundTripper}, http.MethodPost, target), nil
}
